"""What the service manager is told: that the worker started, what it does, that it is alive."""
