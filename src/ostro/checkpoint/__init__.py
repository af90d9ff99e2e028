"""Weights folders and train state on disk."""
