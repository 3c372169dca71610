"""A real worker, nats-server and VMMs of the mini guest, end to end."""
