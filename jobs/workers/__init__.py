"""What runs on Ray Train's workers."""
