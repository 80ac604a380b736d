"""How good clips are: sources, scores, gate, video metrics."""
