"""The jail of a VMM: its directory layout, sockets, logs, secrets."""
