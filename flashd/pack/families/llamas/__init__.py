"""Families that are a Llama but for little: one feed-forward network a layer, gated, and RMS norms."""
