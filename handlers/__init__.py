"""What a command does to this host: one file per group of commands; decides, touches nothing."""
