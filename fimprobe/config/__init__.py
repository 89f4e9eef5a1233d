"""Options of ``attach`` and ``measure``: one description each, YAML with line numbers, messages."""
