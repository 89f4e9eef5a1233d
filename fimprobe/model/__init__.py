"""The model under measurement: its storage-sharing copy, the batch, and the outputs in what it returns."""
