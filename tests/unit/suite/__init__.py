"""The suite itself: what it notices, and what of it runs at the same time."""
