"""The SQLite journal: commands, steps, records, outbox."""
