"""What every package leans on: files, work that survives, dtypes, JSON."""
