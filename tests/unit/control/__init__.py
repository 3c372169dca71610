"""Unit tests of `worker/control`."""
