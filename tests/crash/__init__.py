"""Tests, by kind: see docs/testing.md."""
