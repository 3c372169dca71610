"""From one version of the journal's tables to the next, and back by a backup."""
