"""What a researcher runs on one machine: simulate, check, compare."""
