"""What is too long for a test: a model with ReLU neurons, trained here, and what is measured on it."""
