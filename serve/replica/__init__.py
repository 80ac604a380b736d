"""One per GPU: the engine and its encoders."""
