"""Families most of whose layers keep a state in place of keys and values."""
