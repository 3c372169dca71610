"""`hostd demo`, and what it needs of its own: nats-server, network namespace, clean-up."""
