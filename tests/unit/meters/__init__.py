"""Unit tests of worker/meters."""
