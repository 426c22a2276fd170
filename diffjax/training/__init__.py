"""Training: state, step, optimisers, sharding, checkpoints, logging and the loop."""
