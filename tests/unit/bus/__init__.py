"""Unit tests of the lease and of what the bus reports, without a server."""
