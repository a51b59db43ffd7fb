"""The lead's report on a run, from the run folder alone. Nothing here can read an image."""
