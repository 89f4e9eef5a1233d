"""Which distribution of labels a loss, a criterion or a model class implies, and which labels."""
