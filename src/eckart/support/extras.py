"""Packages that only some commands need: an extra of this package installs them."""

from importlib.util import find_spec

from eckart.errors import OptionError


def require(extra: str, what: str, *modules: str) -> None:
    """Raise `OptionError` that names the missing modules and the extra that brings them."""
    missing = [module for module in modules if find_spec(module.partition(".")[0]) is None]
    if missing:
        raise OptionError(f"{what} needs {', '.join(missing)}, not installed here: pip install 'eckart[{extra}]'.")
