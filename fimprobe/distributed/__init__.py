"""Several processes, one measurement: how they join, and how their statistics are merged."""
