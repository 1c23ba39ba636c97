"""Pages that load nothing: a template and the one style sheet, in one HTML text."""

import re
from importlib.resources import files
from typing import Any

from eckart.version import __version__

# Control characters but line break and tab, what turns the direction of writing, and halves of surrogates.
HOSTILE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def render(template: str, **values: Any) -> str:
    """Fill a template of `templates/`; values are escaped, charts are passed through by the template.

    Characters that no page should hold are written out as escapes such as `\\x1b`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("eckart.pages"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    style = Markup((files("eckart.pages") / "templates" / "page.css").read_text(encoding="utf-8"))
    page = environment.get_template(template).render(version=__version__, style=style, **values)
    return HOSTILE.sub(lambda found: found[0].encode("unicode_escape").decode(), page)
