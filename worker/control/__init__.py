"""The local control interface: HTTP/1.1 with JSON on a Unix socket, for root on this host."""
