"""Parts of layers that only some models have."""
