"""Families whose layers have a mixture of experts."""
