"""What runs beside Flower on real machines: `lead/` and `site/`, which never import each other."""
