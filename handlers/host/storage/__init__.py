"""Artifacts, data disks, drive images, and the files shared with agentd."""
