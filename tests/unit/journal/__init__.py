"""Unit tests of worker/journal."""
