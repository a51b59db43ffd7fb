"""Statistics and pictures for the people who run a study."""
