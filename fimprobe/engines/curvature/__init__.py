"""Second order: double backwards along random directions, summed up by parameter."""
