"""Unit tests of handlers/instance."""
