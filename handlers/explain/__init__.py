"""What a command would do now, found by running its handler on a host that only answers reads."""
