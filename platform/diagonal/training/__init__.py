"""How networks learn: losses, parallelism, stages, checkpoints."""
