"""Plans: which matrix gets which rank, as plain data."""

from eckart.plans.plan import Plan, resolve

__all__ = ["Plan", "resolve"]
