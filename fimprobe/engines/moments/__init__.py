"""First order: per-sample gradients contracted to sums of powers, parameter by parameter."""
