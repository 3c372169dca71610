"""Measurements, each side by side with its raw alternative in one run: `python -m bench`."""
