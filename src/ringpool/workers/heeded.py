"""A fork server that imports this was started with SIGINT held back from it alone: ``ahead`` gives it back to what is
no worker. Where a whole program holds signals back from all its processes, the server does not import this.
"""
