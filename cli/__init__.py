"""The `semisam` command: parses and prints; a command imports the room it needs."""
