"""A site's own report on a run, with pictures, from what the site has stored. It stays at the site."""
