"""``attach`` and the probe: the one object with state, inside a training loop."""
