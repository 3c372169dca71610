"""The formats of the kernel, without the kernel."""
