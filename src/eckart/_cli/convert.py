"""`eckart convert`: another storage for a saved model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import eckart
from eckart._cli import terminal
from eckart._cli.app import app, print_json
from eckart._cli.options import Json


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of eckart.")],
    storage: Annotated[str, typer.Option(help="pair, pivoted (fewest numbers) or dense (an ordinary model).")],
    out: Annotated[Path, typer.Option(help="Folder for the new checkpoint; must be new or empty.")],
    as_json: Json = False,
) -> None:
    """Change how a saved model's factors are stored, without compressing it again.

    Example: `eckart convert DIR --storage dense --out DENSE`
    """
    with terminal.progress_bars(quiet=as_json) as progress:
        conversion = eckart.convert(folder, storage=storage, out=out, progress=progress)
    if as_json:
        print_json({"out": str(out), "storage": storage, **asdict(conversion), "ledger": conversion.ledger.to_dict()})
        return
    terminal.show_ledger(conversion.ledger)
    for name, reason in conversion.left.items():
        terminal.say(f"{name}: stays as it is, since it {reason}.")
    terminal.say(f"{conversion.changed} layers changed. Checkpoint: {out}")
