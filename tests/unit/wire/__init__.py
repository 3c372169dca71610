"""Unit tests of schemas: the wire and the files shared with agentd."""
