"""Unit tests of handlers/host/vmm."""
