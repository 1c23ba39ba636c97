"""`eckart plan`: ranks without touching a weight."""

from pathlib import Path
from typing import Annotated

import typer

import eckart
from eckart._cli import terminal
from eckart._cli.app import app, print_json
from eckart._cli.options import (
    Bits,
    Bos,
    Data,
    Device,
    Dtype,
    Exclude,
    Include,
    Join,
    Json,
    Keep,
    Length,
    MaxKl,
    Model,
    Options,
    RankMultiple,
    Recipe,
    Seed,
    Size,
    Storage,
    Tokenizer,
    TrustRemoteCode,
    Widths,
    Windows,
    Work,
    parse_options,
    unescape,
)
from eckart.support.files import check_file


@app.command()
def plan(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to write the plan (.json).")],
    recipe: Recipe = "eckart",
    keep: Keep = None,
    size: Size = None,
    max_kl: MaxKl = None,
    bits: Bits = None,
    widths: Widths = None,
    rank_multiple: RankMultiple = 1,
    storage: Storage = None,
    option: Options = [],  # noqa: B006
    data: Data = "wikitext2",
    windows: Windows = 256,
    length: Length = 2048,
    seed: Seed = None,
    join: Join = "\\n\\n",
    bos: Bos = "start",
    include: Include = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    device: Device = "cpu",
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    work: Work = None,
    as_json: Json = False,
) -> None:
    """Write the plan (which matrix gets which rank) without touching a weight.

    Example: `eckart plan MODEL --recipe svd-llm --keep 0.6 --data corpus.txt --out plan.json`
    """
    check_file(out)  # before any work
    with terminal.progress_bars(quiet=as_json) as progress:
        result = eckart.plan(
            model,
            recipe=recipe,
            keep=keep,
            size=size,
            max_kl=max_kl,
            bits=bits,
            widths=widths,
            rank_multiple=rank_multiple,
            storage=storage,
            options=parse_options(option),
            calibration=eckart.Calibration(data, windows, length, seed, unescape(join), bos),
            include=include,
            exclude=exclude,
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            work=work,
            progress=progress,
        )
    result.save(out)
    if as_json:
        print_json(result.to_dict())
    else:
        terminal.show_reached(result)
        terminal.say(f"{len(result.entries)} matrices. Plan: {out}")
