"""`eckart export`: a model for other tools."""

from pathlib import Path
from typing import Annotated

import typer

import eckart
from eckart._cli import terminal
from eckart._cli.app import app, print_json
from eckart._cli.options import Json


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A checkpoint of eckart; for onnx and openvino any model.")],
    to: Annotated[str, typer.Option(help="merged (a plain dense folder, for GGUF, CTranslate2), onnx or openvino.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; must be new or empty.")],
    int8: Annotated[bool, typer.Option("--int8", help="With onnx and openvino: 8-bit weights.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model for ONNX Runtime, OpenVINO, or tools that know dense models only.

    Example: `eckart export DIR --to onnx --int8 --out GRAPH`
    """
    with terminal.progress_bars(quiet=as_json) as progress:
        result = eckart.export(model, to=to, out=out, int8=int8, progress=progress)
    if as_json:
        print_json(result.to_dict())
        return
    terminal.say(f"{result.note}")
    terminal.say(f"{result.bytes / 1e6:,.1f} MB, from {result.source_bytes / 1e6:,.1f} MB of weights: {result.out}")
