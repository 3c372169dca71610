"""Unit tests of worker/demo."""
