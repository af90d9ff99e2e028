"""Ranks: meshes, collectives, plans."""
