"""The mathematics of diffusion and flow models: pure functions over jax and numpy arrays."""
