"""`eckart verify`: is a checkpoint still what was saved?"""

from pathlib import Path
from typing import Annotated

import typer

import eckart
from eckart._cli import terminal
from eckart._cli.app import app, print_json
from eckart._cli.options import Json
from eckart.errors import CheckpointError


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of eckart.")],
    accept: Annotated[
        bool, typer.Option("--accept", help="Record the files as they are: it was trained or edited on purpose.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare every file of a checkpoint with what was saved, and its parts with one another.

    Example: `eckart verify DIR`
    """
    found = eckart.verify(folder, accept=accept)
    if as_json:
        print_json(found.to_dict())
    else:
        terminal.show_verification(found)
    if not found.whole:
        wrong = [file.file for file in found.files if file.state in ("changed", "missing")]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{folder}: {wrong[0]}{more} of {len(found.files)} files not as saved; copy or download again, or, if you "
            f"trained or edited it on purpose: eckart verify {folder} --accept"
        )
