"""Unit tests of the worker process: its log, descriptors and signals."""
