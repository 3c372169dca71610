"""Kernel tests of handlers/host/snapshot."""
