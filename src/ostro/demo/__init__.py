"""Small real data for the demos, prepared from installed packages."""
