"""Unit tests of `worker/doctor`."""
