"""The question of one measurement: problem, output cotangents, weights, memory."""
