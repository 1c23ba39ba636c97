"""Pages that load nothing: a template and the one style sheet, in one HTML text."""

from importlib.resources import files
from typing import Any

from eckart.version import __version__


def render(template: str, **values: Any) -> str:
    """Fill a template of `templates/`; values are escaped, charts are passed through by the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("eckart.pages"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    style = Markup((files("eckart.pages") / "templates" / "page.css").read_text(encoding="utf-8"))
    text = environment.get_template(template).render(version=__version__, style=style, **values)
    return text.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair is no text that can be written
