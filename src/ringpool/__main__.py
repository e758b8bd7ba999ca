"""``python -m ringpool``: the same as the command ``ringpool``."""

from __future__ import annotations

if __name__ == "__main__":  # a worker process may import its coordinator's main module again: it gets nothing
    from ringpool.cli import main

    main()
