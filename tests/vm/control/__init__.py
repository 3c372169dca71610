"""Real hosts by their control socket and the local command line."""
