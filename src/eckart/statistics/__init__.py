"""What calibration collects, and the sweep that collects it."""

from eckart.statistics.sums import Gram, GroupStatistics, Need, Statistics

__all__ = ["Gram", "GroupStatistics", "Need", "Statistics"]
