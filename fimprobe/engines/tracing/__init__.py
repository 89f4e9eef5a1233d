"""One recorded forward pass: uses of parameters, the autograd graph, how each parameter is reached."""
