"""A state directory that cannot be written, at start and while the worker runs."""
