"""Training as in the SWA paper: the data, the learning-rate plan, the loop and its checkpoints."""
