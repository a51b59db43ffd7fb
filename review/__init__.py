"""A radiologist at the site: which pseudo-labels to look at, rating and correcting them, labels that come of it."""
