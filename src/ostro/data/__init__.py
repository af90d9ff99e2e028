"""Data sources, batches and loaders."""
