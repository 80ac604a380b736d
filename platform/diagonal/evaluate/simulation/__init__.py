"""Capacity on a simulated clock."""
