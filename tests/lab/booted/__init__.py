"""Tests that need a booted systemd; `tests/lab/test_package.py` runs them in the lab."""
