"""Traces: the context of each command, its spans, and their way to a collector."""
