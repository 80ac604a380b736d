"""One process: database, chunks, quotas, keys."""
