"""The five instance commands, one file each, and what they share."""
