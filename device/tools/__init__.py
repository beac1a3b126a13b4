"""Tools: one class for each kind, `kinds.py`, which names them all, and what makes the model's calls."""
