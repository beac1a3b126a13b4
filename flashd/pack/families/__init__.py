"""The model families: one file a family, and the recipe that reads a model by it. README.md says how to add one."""
