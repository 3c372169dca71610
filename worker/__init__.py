"""How commands arrive and results leave: bus, intake, journal, lanes, dispatch, outbox."""
