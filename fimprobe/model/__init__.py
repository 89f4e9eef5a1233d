"""The model under measurement: its storage-sharing copy, the batch, the outputs it returns."""
