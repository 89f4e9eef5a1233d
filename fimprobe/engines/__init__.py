"""Engines: from a problem (model, batch, labels) to sufficient statistics.

In the order of a measurement: ``problem`` asks, ``tracing`` records a forward with the knowledge of
``layers``, cotangents are pulled back by ``primitives``, ``moments`` contracts first-order gradients
and ``curvature`` second derivatives; ``autograd`` runs them chunk by chunk over a verified plan.
``backpack`` is the second engine, the other one's oracle.
"""
