"""Find, check, split, load and transform scans; make the phantom hospitals."""
