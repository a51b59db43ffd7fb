"""Differential privacy of patients: their clipped gradients, the noise, and how much privacy was spent."""
