"""Sensors: one class for each kind, and `kinds.py`, which names them all."""
