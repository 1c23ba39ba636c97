"""`eckart eval`: perplexity and tasks, dense beside compressed."""

from pathlib import Path
from typing import Annotated

import typer

import eckart
from eckart._cli import terminal
from eckart._cli.app import app, print_json
from eckart._cli.options import (
    Bos,
    ComputeDtype,
    Device,
    Join,
    Json,
    Length,
    Mean,
    MeasureWindows,
    Model,
    Seed,
    Tokenizer,
    TrustRemoteCode,
    unescape,
)


@app.command(name="eval")
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(help="The dense model, measured beside it.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on; repeat for several corpora. wikitext2 if there is no --tasks either."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of the LM Evaluation Harness: a,b,c, or papers for the seven of the papers."),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more tasks, as the harness's YAML.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many documents of each task.")] = None,
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
    """Perplexity and tasks, dense beside compressed, under one stated protocol.

    Example: `eckart eval DIR --against MODEL --data wikitext2 --data python-docs --tasks papers`
    """
    with terminal.progress_bars(quiet=as_json) as progress:
        result = eckart.evaluate(
            model,
            against=against,
            data_specs=data or None,
            task_names=[name.strip() for name in tasks.split(",")] if tasks else (),
            include_path=include_path,
            limit=limit,
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
        print_json(result)
    else:
        terminal.show_results(result)
