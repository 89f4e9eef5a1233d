"""From the engines' statistics to a report: estimates by group, advice, tables."""
