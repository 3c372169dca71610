"""What hostd is measured against: the same done without it."""
