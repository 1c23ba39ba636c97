"""`eckart inspect`: what would be compressed, and why the rest would not."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

import eckart
from eckart._cli import terminal
from eckart._cli.app import app, print_json
from eckart._cli.options import (
    Bos,
    Data,
    Device,
    Exclude,
    Include,
    Join,
    Json,
    Length,
    Model,
    Options,
    Recipe,
    Seed,
    Tokenizer,
    TrustRemoteCode,
    Windows,
    parse_options,
    unescape,
)


@app.command()
def inspect(
    model: Model,
    include: Include = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    spectra: Annotated[bool, typer.Option("--spectra", help="Calibrate, and show how dense each module is.")] = False,
    recipe: Recipe = "svd-llm",
    option: Options = [],  # noqa: B006
    data: Data = "wikitext2",
    windows: Windows = 256,
    length: Length = 2048,
    seed: Seed = None,
    join: Join = "\\n\\n",
    bos: Bos = "start",
    device: Device = "cpu",
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """What would be compressed, what would not, and why; with --spectra the effective ranks of each module, too.

    Without --spectra no weight is read, and the options from --recipe on have no part in it.

    Example: `eckart inspect MODEL --spectra --data corpus.txt --windows 32 --length 512`
    """
    layout = eckart.inspect(model, include=include, exclude=exclude, trust_remote_code=trust_remote_code)
    rows: list[dict[str, Any]] = []
    if spectra:
        from eckart.plans.figures import describe

        with terminal.progress_bars(quiet=as_json) as progress:
            spectrum_list = eckart.spectra(
                model,
                recipe=recipe,
                options=parse_options(option),
                calibration=eckart.Calibration(data, windows, length, seed, unescape(join), bos),
                include=include,
                exclude=exclude,
                device=device,
                tokenizer=tokenizer,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        rows = [describe(spectrum) for spectrum in spectrum_list]
    if as_json:
        share = {"covered": layout.covered, "uncovered": layout.uncovered}
        print_json({"model": model, **share, **asdict(layout), **({"spectra": rows} if spectra else {})})
        return
    terminal.show_layout(layout)
    if spectra:
        terminal.show_spectra(rows)
