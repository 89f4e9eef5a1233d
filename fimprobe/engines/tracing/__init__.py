"""One recorded forward: uses of layers, the autograd graph, the plan to reach each parameter."""
