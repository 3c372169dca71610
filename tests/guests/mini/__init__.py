"""The mini guest: a freestanding program that Firecracker boots in place of a kernel."""
