"""The `hostd` command: one file per group of subcommands; talks to a worker only over the bus."""
