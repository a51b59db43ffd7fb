"""The `semisam` command: the one room that knows the other three."""
