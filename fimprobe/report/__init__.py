"""From the statistics of the engines to a report: estimates by group, advice, tables."""
