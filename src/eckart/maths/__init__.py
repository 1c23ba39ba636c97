"""Arithmetic and linear algebra without models: tensors or numbers in, tensors or numbers out."""
