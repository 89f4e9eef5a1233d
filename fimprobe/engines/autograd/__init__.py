"""The autograd engine: all chunks of a batch, its plan made and verified, its results gathered."""
