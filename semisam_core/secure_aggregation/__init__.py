"""Sums of which the server learns nothing but the total: keys and masks, fixed-point numbers, whole weights."""
