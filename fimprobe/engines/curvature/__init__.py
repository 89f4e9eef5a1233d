"""Second order: double backward passes along random directions, summed for each parameter."""
