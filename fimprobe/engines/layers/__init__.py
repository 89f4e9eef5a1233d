"""Knowledge about single layers: rules of per-sample gradients, decompositions, activations."""
