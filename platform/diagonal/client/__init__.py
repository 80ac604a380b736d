"""Python client and command line; imports neither torch nor Ray."""
