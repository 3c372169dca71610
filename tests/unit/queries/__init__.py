"""Unit tests of `worker/queries`."""
