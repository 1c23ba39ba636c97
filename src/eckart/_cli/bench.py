"""`eckart bench`: speed and memory, dense beside compressed."""

from pathlib import Path
from typing import Annotated

import typer

import eckart
from eckart._cli import terminal
from eckart._cli.app import app, print_json
from eckart._cli.options import ComputeDtype, Device, Json, Model


@app.command()
def bench(
    model: Model,
    against: Annotated[str, typer.Option(help="The dense model, timed in turns with it.")],
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences at once. Repeatable.")] = [1, 8, 64],  # noqa: B006
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Tokens generated after it.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each model; the median is given.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU; torch's number without it.")] = None,
    device: Device = "cpu",
    dtype: ComputeDtype = "auto",
    int8: Annotated[bool, typer.Option("--int8", help="Export both to ONNX with int8 first, and time that.")] = False,
    graphs: Annotated[Path | None, typer.Option(help="With --int8: keep the exported graphs in this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Tokens per second, time to the first token and peak memory, beside what the sizes allow at best.

    Example: `eckart bench DIR --against MODEL --batch 1 --batch 8 --threads 1`
    """
    with terminal.progress_bars(quiet=as_json) as progress:
        result = eckart.bench(
            model,
            against=against,
            batches=batch,
            prompt=prompt,
            steps=steps,
            repeats=repeats,
            threads=threads,
            device=device,
            dtype=dtype,
            int8=int8,
            graphs=graphs,
            progress=progress,
        )
    if as_json:
        print_json(result)
    else:
        terminal.show_bench(result)
