"""What is known of single layers: rules of per-sample gradients, decompositions, activations."""
