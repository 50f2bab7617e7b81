"""Training: model and optimizer from a recipe, the loop, the run folder, checkpoints."""
