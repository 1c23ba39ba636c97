"""The command line: one file for each command, which parses, calls one public function and prints."""

from eckart._cli import inspect, plan, compress, evaluate, report, compare, convert, demo, methods  # noqa: F401, I001  the order of --help
from eckart._cli.app import app, main

__all__ = ["app", "main"]
