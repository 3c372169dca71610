"""Streams, consumers, accounts and permissions, against a real nats-server."""
