"""Measurements of Diagonal itself."""
