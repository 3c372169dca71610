"""Kernel tests of handlers/host/vmm."""
