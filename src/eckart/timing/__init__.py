"""How fast a model is, and how fast it could be."""
