"""Sources of evidence for a pseudo-label, one file each, and how they are combined."""
