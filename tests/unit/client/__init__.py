"""Unit tests of worker/client."""
