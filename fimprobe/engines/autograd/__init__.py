"""The autograd engine: chunks of a batch, the verified plan, and the results of all chunks."""
