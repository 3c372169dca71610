"""Tests of hosts and VMMs that fail in ways that kill nothing."""
