"""Tests that run in the lab; `tests/lab/test_lab.py` brings them there and reports each."""
