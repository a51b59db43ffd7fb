"""One plan for all sites, derived from what they said about their scans."""
