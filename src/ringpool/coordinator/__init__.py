"""What happens outside the worker processes."""
