"""Kernel tests of handlers/host/jail."""
