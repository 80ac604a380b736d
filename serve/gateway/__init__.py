"""One per process: decides and drives sessions; reaches store and replicas by handle only."""
