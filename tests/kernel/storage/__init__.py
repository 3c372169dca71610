"""Kernel tests of handlers/host/storage."""
