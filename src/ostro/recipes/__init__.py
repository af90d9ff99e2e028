"""Recipes that ship with Ostro."""
