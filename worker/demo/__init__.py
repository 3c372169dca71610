"""`hostd demo` and its environment: nats-server, network namespace, cleanup.

The tests use the environment too. Nothing here runs in a production worker.
"""
