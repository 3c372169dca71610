"""The benchmarks: their rows, their table, and what of them runs in memory."""
