"""Unit tests of what is around the code: documentation, packaging, deployment files, tools."""
