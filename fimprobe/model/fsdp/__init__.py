"""Models whose parameters FSDP2 shards over the processes."""
