"""`eckart demo`: the whole job on a real model."""

from pathlib import Path
from typing import Annotated

import typer

from eckart._cli import terminal
from eckart._cli.app import app, print_json
from eckart._cli.options import Json, Recipe


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the compressed model.")] = Path("eckart-demo"),
    keep: Annotated[float, typer.Option(help="Share of the targets' parameters that is KEPT, in (0, 1].")] = 0.8,
    recipe: Recipe = "eckart",
    as_json: Json = False,
) -> None:
    """The whole job on a real 135M model (a 4-bit file, dequantised) from the package registry; no hub, no data needed.

    Example: `eckart demo --keep 0.9`
    """
    from eckart.demo.run import run_demo

    with terminal.progress_bars(quiet=as_json) as progress:
        report = run_demo(out, recipe=recipe, keep=keep, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        terminal.show_demo(report)
