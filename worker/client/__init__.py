"""The client of hostd for Python programs: an agentd, a scheduler, a dashboard."""
