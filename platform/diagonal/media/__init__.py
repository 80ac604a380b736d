"""What viewers receive: encoded chunks, and measures of any video."""
