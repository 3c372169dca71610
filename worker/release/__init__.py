"""Which build of hostd this is."""
