"""Pure decisions of the service: no I/O, and of Ray its two base classes alone."""
