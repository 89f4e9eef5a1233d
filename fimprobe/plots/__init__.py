"""The figures of a run, from records; only ``style.py`` imports matplotlib."""
