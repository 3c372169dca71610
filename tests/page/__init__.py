"""The fleet page in a real browser, against a real nats-server and real workers."""
