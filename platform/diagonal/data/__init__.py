"""What training reads: prompts, trajectories, and the embedded world."""
