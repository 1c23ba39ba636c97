"""What is measured on a model while it is compressed."""
