"""Reports, built from the statistics of the engines: estimates by group, advice, tables."""
