"""Pages whose commands are typed as they stand."""
