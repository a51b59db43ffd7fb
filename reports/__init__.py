"""Reports on a study: the lead's, of aggregates only, and a site's own, with pictures. Neither imports the other."""
