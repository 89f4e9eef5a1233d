"""A diagonal from elsewhere compared with F: how far it is off, and which computation it is.

``theirs`` reads it, ``comparison`` measures how far it is off, ``candidates`` computes what common
code does, ``diagnosis`` decides which of these fits. See docs/guides/audit.md.
"""
