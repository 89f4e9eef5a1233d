"""What a measurement asks for: the problem, cotangents at the outputs, weights, memory."""
