"""`eckart methods`: recipes and their parts."""

import eckart
from eckart._cli import terminal
from eckart._cli.app import app, print_json
from eckart._cli.options import Json


@app.command()
def methods(as_json: Json = False) -> None:
    """Recipes, factorizers, allocators and refiners with their options.

    Example: `eckart methods --json`
    """
    catalogue = eckart.methods()
    if as_json:
        print_json(catalogue)
        return
    terminal.table(
        "Recipes",
        ("name", "parts"),
        [
            (n, " + ".join(p["name"] for p in (r["factorizer"], r["allocator"], *r["refiners"])) + f": {r['about']}")
            for n, r in catalogue["recipes"].items()
        ],
        justify="left",
    )
    for kind in (kind for kind in catalogue if kind != "recipes"):
        rows = [
            (name, ", ".join(f"{k}={v}" for k, v in options.items()) or "-")
            for name, options in catalogue[kind].items()
        ]
        terminal.table(kind.capitalize(), ("name", "options and defaults"), rows, justify="left")
