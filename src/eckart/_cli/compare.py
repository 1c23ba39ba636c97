"""`eckart compare`: checkpoints side by side."""

from pathlib import Path
from typing import Annotated

import typer

import eckart
from eckart._cli import terminal
from eckart._cli.app import app, print_json
from eckart._cli.options import (
    Against,
    Bos,
    ComputeDtype,
    Device,
    Join,
    Json,
    Length,
    Mean,
    MeasureOn,
    MeasureWindows,
    Results,
    Seed,
    Tokenizer,
    TrustRemoteCode,
    unescape,
)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Checkpoints of eckart, two or more.")],
    results: Results = [],  # noqa: B006
    against: Against = None,
    data: MeasureOn = [],  # noqa: B006
    windows: MeasureWindows = None,
    length: Length = 2048,
    seed: Seed = None,
    join: Join = "\\n\\n",
    bos: Bos = "start",
    mean: Mean = "token",
    device: Device = "cpu",
    dtype: ComputeDtype = "auto",
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path | None, typer.Option(help="Write a page with the table and the plots, too (.html).")] = None,
    as_json: Json = False,
) -> None:
    """Compare checkpoints: size, perplexity, speed, and which of them no other beats.

    Numbers that were not measured alike are refused.

    Example: `eckart compare A B C --results a.json --results b.json --results c.json --out compare.html`
    """
    with terminal.progress_bars(quiet=as_json) as progress:
        comparison = eckart.compare(
            folders,
            results=results,
            against=against,
            data_specs=data,
            windows=windows,
            length=length,
            seed=seed,
            join=unescape(join),
            bos=bos,
            mean=mean,  # type: ignore[arg-type]  # checked there, with a better message
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            out=out,
            progress=progress,
        )
    if as_json:
        print_json(comparison)
    else:
        terminal.show_comparison(comparison)
