"""Mixed commands under faults for minutes: `python -m tests.soak`."""
