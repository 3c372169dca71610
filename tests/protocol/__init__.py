"""The documents of the protocol: `python -m tests.protocol` writes them."""
