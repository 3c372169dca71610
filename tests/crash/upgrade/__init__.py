"""From one release of hostd to another."""
