"""Moved to eckart.discovery (temporary)."""

from eckart.discovery import *  # noqa
