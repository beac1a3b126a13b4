"""Families whose layers have one feed-forward network each."""
