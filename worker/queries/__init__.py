"""Read-only questions over NATS: the micro service `hostd` and `ask.*`."""
