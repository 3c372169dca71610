"""Kernel tests of handlers/host/net."""
