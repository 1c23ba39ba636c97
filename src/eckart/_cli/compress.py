"""`eckart compress`: a model in, a smaller model out."""

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


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; must be new or empty.")],
    recipe: Recipe = "eckart",
    keep: Keep = None,
    size: Size = None,
    max_kl: MaxKl = None,
    bits: Bits = None,
    widths: Widths = None,
    plan: Annotated[Path | None, typer.Option(help="Replay this plan instead of allocating.")] = None,
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
    recover: Annotated[
        bool,
        typer.Option("--recover", help="Then distil the factors against the dense model, on this text and its own."),
    ] = False,
    work: Work = None,
    as_json: Json = False,
) -> None:
    """Compress a model and save a checkpoint that loads in transformers.

    Example: `eckart compress MODEL --recipe svd-llm --keep 0.8 --data corpus.txt --windows 32 --length 512 --out DIR`
    """
    with terminal.progress_bars(quiet=as_json) as progress:
        compression = eckart.compress(
            model,
            recipe=recipe,
            keep=keep,
            size=size,
            max_kl=max_kl,
            bits=bits,
            widths=widths,
            rank_multiple=rank_multiple,
            storage=storage,
            options=with_recovery(recipe, parse_options(option)) if recover else parse_options(option),
            plan=plan,
            calibration=eckart.Calibration(data, windows, length, seed, unescape(join), bos),
            include=include,
            exclude=exclude,
            out=out,
            work=work,
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            on_plan=None if as_json else terminal.show_reached,
            progress=progress,
        )
    if as_json:
        book = compression.ledger.to_dict()
        print_json({"out": str(out), "ledger": book, "seconds": compression.seconds, **compression.provenance})
        return
    if (text := compression.provenance["calibration"]) is not None:
        terminal.show_text(text)
    terminal.show_coverage(compression.layout)
    terminal.show_ledger(compression.ledger)
    if "kl" in compression.provenance:
        terminal.show_kl(compression.provenance["kl"])
    if "metric_drift" in compression.provenance:
        terminal.show_drift(compression.provenance["metric_drift"])
    terminal.say("  ".join(f"{stage} {seconds:.1f} s" for stage, seconds in compression.seconds.items()))
    terminal.say(f"Checkpoint: {out}")


def with_recovery(recipe: str, options: dict[str, str]) -> dict[str, str]:
    """The options with `recover` behind the refiners that they, or else the recipe, name."""
    from eckart.recipes import find  # imports torch

    others = {key: value for key, value in options.items() if key != "refiners"}
    refiners = find(recipe, {key: value for key, value in options.items() if key == "refiners"}).refiners
    return {"refiners": ",".join(refiners if "recover" in refiners else (*refiners, "recover")), **others}
