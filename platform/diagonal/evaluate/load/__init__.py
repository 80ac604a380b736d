"""Figures of a load test."""
