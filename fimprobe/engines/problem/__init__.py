"""The request of a measurement: the problem, cotangents at the outputs, weights, memory."""
