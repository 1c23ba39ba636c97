"""Allocators: how a budget is shared out. One file per method."""
