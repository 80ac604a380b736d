"""Where a video comes from: content credentials, signing key, watermarks."""
