"""`eckart report`: one page about a checkpoint."""

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
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of eckart.")],
    out: Annotated[Path | None, typer.Option(help="The page; DIR/report.html without it.")] = None,
    results: Results = [],  # noqa: B006
    against: Against = None,
    data: MeasureOn = [],  # noqa: B006
    prompt: Annotated[list[str], typer.Option(help="Let the models go on from this text. Repeatable.")] = [],  # noqa: B006
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
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about a checkpoint: ledger, ranks, spectra, losses, samples, speed.

    Without --against, --data and --prompt no weight is read: the page says what the folder and --results know.

    Example: `eckart report DIR --against MODEL --data other.txt --windows 8 --length 512 --results bench.json`
    """
    with terminal.progress_bars(quiet=as_json) as progress:
        facts = eckart.report(
            folder,
            out=out,
            results=results,
            against=against,
            data_specs=data,
            prompts=prompt,
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
            progress=progress,
        )
    if as_json:
        print_json(facts)
    else:
        terminal.say(f"Report: {facts['page']}")
