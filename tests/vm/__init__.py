"""Real VMMs through the real jailer."""
