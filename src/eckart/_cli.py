"""The command line: parse, call one public function, print. Exit codes: 0 done, 2 the user's mistake, 1 else."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import eckart
from eckart import _terminal as terminal
from eckart.errors import EckartError, UserError

app = typer.Typer(
    name="eckart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make Hugging Face language models smaller by low-rank factorisation.",
)

Model = Annotated[str, typer.Argument(help="A hub id or a folder.")]
Recipe = Annotated[str, typer.Option(help="A recipe's name (`eckart methods`) or a .toml file.")]
Keep = Annotated[
    float | None,
    typer.Option(help="Share of the targets' parameters that is KEPT, in (0, 1]; 0.8 if no goal is given."),
]
Size = Annotated[str | None, typer.Option(help="Instead of --keep: the most the weight files may take, as in 80MB.")]
MaxKl = Annotated[
    float | None,
    typer.Option(help="Instead of --keep: the most the predictions may change, predicted, in nats per token (0.05)."),
]
RankMultiple = Annotated[int, typer.Option(min=1, help="Round ranks down to a multiple of this.")]
Options = Annotated[
    list[str], typer.Option("--option", "-o", help="Override a recipe option: factorizer.damping=1e-4. Repeatable.")
]
Data = Annotated[
    str,
    typer.Option(
        help="Text to calibrate on: wikitext2, ptb, c4, name:config:split:column, a .txt .jsonl .json .parquet "
        "file, python-docs, self, or a mixture with counts (wikitext2:64,c4:64)."
    ),
]
Datas = Annotated[list[str], typer.Option("--data", help="Text to measure on; repeat for several corpora.")]
Windows = Annotated[int, typer.Option(min=1, help="Windows of text.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Seed = Annotated[int | None, typer.Option(help="Take windows at random with this seed; without it, from the start.")]
Join = Annotated[str, typer.Option(help="What documents are joined by (\\n is a line break).")]
Bos = Annotated[str, typer.Option(help="Where a BOS token goes: start (of the text), window, none.")]
Include = Annotated[list[str], typer.Option(help="Only linears that match this pattern (*.down_proj). Repeatable.")]
Exclude = Annotated[list[str], typer.Option(help="Leave linears that match this pattern. Repeatable.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="Stored dtype: auto (the checkpoint's), float32, bfloat16, float16.")]
Work = Annotated[
    Path | None, typer.Option(help="Folder for finished pieces of a long run; the same command resumes there.")
]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output, nothing else there.")]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if show:
        print(f"eckart {eckart.__version__}")
        raise typer.Exit


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
    as_json: Json = False,
) -> None:
    """What would be compressed, what would not, and why; with --spectra the effective ranks of each module, too.

    Without --spectra no weight is read, and the options from --recipe on have no part in it.

    Example: `eckart inspect MODEL --spectra --data corpus.txt --windows 32 --length 512`
    """
    layout = eckart.inspect(model, include=include, exclude=exclude)
    rows: list[dict[str, Any]] = []
    if spectra:
        from eckart.density import describe

        with terminal.progress_bars(quiet=as_json) as progress:
            found = eckart.spectra(
                model,
                recipe=recipe,
                options=parse_options(option),
                calibration=eckart.Calibration(data, windows, length, seed, unescape(join), bos),
                include=include,
                exclude=exclude,
                device=device,
                progress=progress,
            )
        rows = [describe(spectrum) for spectrum in found]
    if as_json:
        print_json({"model": model, **asdict(layout), **({"spectra": rows} if spectra else {})})
        return
    terminal.show_layout(layout)
    if spectra:
        terminal.show_spectra(rows)


@app.command()
def plan(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to write the plan (.json).")],
    recipe: Recipe = "eckart",
    keep: Keep = None,
    size: Size = None,
    max_kl: MaxKl = None,
    rank_multiple: RankMultiple = 1,
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
    work: Work = None,
    as_json: Json = False,
) -> None:
    """Write the plan (which matrix gets which rank) without touching a weight.

    Example: `eckart plan MODEL --recipe svd-llm --keep 0.6 --data corpus.txt --out plan.json`
    """
    with terminal.progress_bars(quiet=as_json) as progress:
        made = eckart.plan(
            model,
            recipe=recipe,
            keep=keep,
            size=size,
            max_kl=max_kl,
            rank_multiple=rank_multiple,
            options=parse_options(option),
            calibration=eckart.Calibration(data, windows, length, seed, unescape(join), bos),
            include=include,
            exclude=exclude,
            device=device,
            work=work,
            progress=progress,
        )
    made.save(out)
    if as_json:
        print_json(made.to_dict())
    else:
        terminal.show_reached(made)
        terminal.out.print(f"{len(made.entries)} matrices. Plan: {out}")


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; must be new or empty.")],
    recipe: Recipe = "eckart",
    keep: Keep = None,
    size: Size = None,
    max_kl: MaxKl = None,
    plan: Annotated[Path | None, typer.Option(help="Replay this plan instead of allocating.")] = None,
    rank_multiple: RankMultiple = 1,
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
    recover: Annotated[
        bool, typer.Option("--recover", help="Then distil the factors against the dense model on the same text.")
    ] = False,
    work: Work = None,
    as_json: Json = False,
) -> None:
    """Compress a model and save a checkpoint that loads in transformers.

    Example: `eckart compress MODEL --recipe svd-llm --keep 0.8 --data corpus.txt --windows 32 --length 512 --out DIR`
    """
    with terminal.progress_bars(quiet=as_json) as progress:
        made = eckart.compress(
            model,
            recipe=recipe,
            keep=keep,
            size=size,
            max_kl=max_kl,
            rank_multiple=rank_multiple,
            options={**with_recovery(recipe, recover), **parse_options(option)},
            plan=plan,
            calibration=eckart.Calibration(data, windows, length, seed, unescape(join), bos),
            include=include,
            exclude=exclude,
            out=out,
            work=work,
            device=device,
            dtype=dtype,
            on_plan=None if as_json else terminal.show_reached,
            progress=progress,
        )
    if as_json:
        print_json({"out": str(out), "ledger": made.ledger.to_dict(), "seconds": made.seconds, **made.provenance})
        return
    terminal.show_ledger(made.ledger)
    terminal.out.print("  ".join(f"{stage} {seconds:.1f} s" for stage, seconds in made.seconds.items()))
    terminal.out.print(f"Checkpoint: {out}")


@app.command(name="eval")
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(help="The dense model, measured beside it.")] = None,
    data: Datas = ["wikitext2"],  # noqa: B006
    windows: Annotated[int | None, typer.Option(min=1, help="Windows per corpus; the whole text without it.")] = None,
    length: Length = 2048,
    seed: Seed = None,
    join: Join = "\\n\\n",
    bos: Bos = "start",
    mean: Annotated[
        str, typer.Option(help="token (of the field) or window (D-Rank's, keeps the short tail).")
    ] = "token",
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Computing dtype: auto, float32, bfloat16, float16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity, dense beside compressed, under one stated protocol.

    Example: `eckart eval DIR --against MODEL --data wikitext2 --data python-docs`
    """
    with terminal.progress_bars(quiet=as_json) as progress:
        result = eckart.evaluate(
            model,
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
            progress=progress,
        )
    if as_json:
        print_json(result)
    else:
        terminal.show_results(result)


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="A checkpoint of eckart.")],
    storage: Annotated[str, typer.Option(help="pair, pivoted (fewest numbers) or dense (an ordinary model).")],
    out: Annotated[Path, typer.Option(help="Folder for the new checkpoint; must be new or empty.")],
    as_json: Json = False,
) -> None:
    """Change how a saved model's factors are stored, without compressing it again.

    Example: `eckart convert DIR --storage dense --out DENSE`
    """
    with terminal.progress_bars(quiet=as_json) as progress:
        made = eckart.convert(folder, storage=storage, out=out, progress=progress)
    if as_json:
        print_json({"out": str(out), "storage": storage, **asdict(made), "ledger": made.ledger.to_dict()})
        return
    terminal.show_ledger(made.ledger)
    for name, reason in made.left.items():
        terminal.out.print(f"{name}: stays as it is, since it {reason}.")
    terminal.out.print(f"{made.changed} layers changed. Checkpoint: {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the compressed model.")] = Path("eckart-demo"),
    keep: Annotated[float, typer.Option(help="Share of the targets' parameters that is KEPT, in (0, 1].")] = 0.8,
    recipe: Recipe = "eckart",
    as_json: Json = False,
) -> None:
    """The whole job on a real 135M model that comes from the package registry; no hub, no data needed.

    Example: `eckart demo --keep 0.9`
    """
    from eckart.demo import run_demo

    with terminal.progress_bars(quiet=as_json) as progress:
        report = run_demo(out, recipe=recipe, keep=keep, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        terminal.show_demo(report)


@app.command()
def methods(as_json: Json = False) -> None:
    """Recipes, factorizers, allocators and refiners with their options.

    Example: `eckart methods --json`
    """
    known = eckart.methods()
    if as_json:
        print_json(known)
        return
    terminal.table(
        "Recipes",
        ("name", "parts"),
        [
            (n, " + ".join(p["name"] for p in (r["factorizer"], r["allocator"], *r["refiners"])) + f": {r['about']}")
            for n, r in known["recipes"].items()
        ],
        justify="left",
    )
    for kind in (kind for kind in known if kind != "recipes"):
        rows = [
            (name, ", ".join(f"{k}={v}" for k, v in options.items()) or "-") for name, options in known[kind].items()
        ]
        terminal.table(kind.capitalize(), ("name", "options and defaults"), rows, justify="left")


def parse_options(pairs: list[str]) -> dict[str, str]:
    """`["factorizer.damping=1e-4"]` to a mapping."""
    parsed = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--option {pair!r}: must look like factorizer.damping=1e-4.")
        parsed[key] = value
    return parsed


def with_recovery(recipe: str, recover: bool) -> dict[str, str]:
    """The option that puts `recover` after the refiners of a recipe; nothing without it."""
    from eckart.recipes import find  # imports torch

    return {"refiners": ",".join([*find(recipe).refiners, "recover"])} if recover else {}


def unescape(text: str) -> str:
    """Line breaks and tabs that a shell cannot easily say."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=1))


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        sys.stderr.write(f"eckart: {error}\n")
        sys.exit(2)
    except (EckartError, MemoryError) as error:
        sys.stderr.write(f"eckart: {error or 'out of memory; lower --length or --windows.'}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("eckart: interrupted; nothing was written.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
