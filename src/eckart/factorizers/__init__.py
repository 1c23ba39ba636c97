"""Factorizers: in which metric a weight is decomposed. One file per method."""
