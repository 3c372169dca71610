"""Firecracker and its jailer: processes, cgroups, API client, guest agent."""
