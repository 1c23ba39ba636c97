"""What every package leans on: files, finished work on disk, dtypes, JSON."""
