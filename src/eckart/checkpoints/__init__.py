"""Checkpoints: saved, loaded, converted, and what they say of themselves."""
