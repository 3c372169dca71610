"""Bring what runs on the host and what the journal says together: recovery, adoption, drift."""
