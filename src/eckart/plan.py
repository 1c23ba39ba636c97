"""Moved to eckart.plans (temporary)."""

from eckart.plans import *  # noqa
from eckart.plans import Plan, resolve  # noqa
