"""One recorded forward: layers and their uses, the autograd graph, the plan to reach each parameter."""
