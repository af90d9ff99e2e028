"""Encoding texts with a trained model."""
