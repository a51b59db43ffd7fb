"""The coordinator's side: the study's rounds, admission of updates, aggregation, checkpoints, the run's record."""
