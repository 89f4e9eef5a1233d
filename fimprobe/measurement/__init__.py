"""``measure``: from a model and inputs to a report, isolated from everything around it."""
