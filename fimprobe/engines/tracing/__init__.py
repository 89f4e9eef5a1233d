"""One recorded forward pass: uses of parameters, the autograd graph, and the plan to reach them."""
