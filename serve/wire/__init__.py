"""What callers see: schemas, messages, problems."""
