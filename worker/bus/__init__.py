"""NATS: the connection, guards against defects of nats-py, streams, consumers, publishing."""
