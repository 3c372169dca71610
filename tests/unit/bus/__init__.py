"""Unit tests of worker/bus."""
