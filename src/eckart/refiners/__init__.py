"""Refiners: what updates the factors after they are in the model. One file per method."""
