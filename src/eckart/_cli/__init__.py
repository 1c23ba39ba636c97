"""The command line: one file for each command, which parses, calls one public function and prints."""

from eckart._cli import inspect, plan, compress, evaluate, bench, report, compare  # noqa: F401, I001  order of --help
from eckart._cli import convert, verify, export, demo, methods  # noqa: F401
from eckart._cli.app import app, main

__all__ = ["app", "main"]
