"""Kernel tests of handlers/host/linux."""
