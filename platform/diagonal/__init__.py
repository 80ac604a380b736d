"""Diagonal: distil a bidirectional video diffusion model into a streaming one, and serve it."""

__version__ = "0.1.0"
