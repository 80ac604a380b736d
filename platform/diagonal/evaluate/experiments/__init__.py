"""The paper's tables as data, and their pages."""
