"""The only code that changes the machine: one kernel or VMM mechanism per file."""
