"""Guests to test with, and the binaries that run them: built from this directory into build/."""
