"""Snapshots on disk: memory file, state file, manifest."""
