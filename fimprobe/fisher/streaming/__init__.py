"""The course of one estimate: batches read, inputs chosen, errors watched, state kept."""
