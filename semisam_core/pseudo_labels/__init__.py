"""From prompts to pseudo-labels: ensemble, fusion, calibration, cold start, store."""
