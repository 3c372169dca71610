"""NATS: the connection, its guards against defects of nats-py, streams, consumers, publishing."""
