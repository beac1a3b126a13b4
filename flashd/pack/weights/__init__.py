"""The weights of a model file by what they do."""
