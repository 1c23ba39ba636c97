"""The options that several commands share, and how their text is read."""

from pathlib import Path
from typing import Annotated

import typer

from eckart.errors import UserError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id or a folder.")]
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
Bits = Annotated[
    float | None,
    typer.Option(help="Instead of --keep: bits per weight of the targets, scales and all else counted, as in 3.5."),
]
Widths = Annotated[
    str | None,
    typer.Option(help="Bits that a number may have, as in 4,8; allows few bits with --size and --max-kl, too."),
]
Storage = Annotated[
    str | None,
    typer.Option(help="How factors are stored, not as the recipe says: pair or pivoted (fewest numbers)."),
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
Windows = Annotated[int, typer.Option(min=1, help="Windows of text.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Seed = Annotated[int | None, typer.Option(help="Take windows at random with this seed; without it, from the start.")]
Join = Annotated[str, typer.Option(help="What documents are joined by (\\n is a line break).")]
Bos = Annotated[str, typer.Option(help="Where a BOS token goes: start (of the text), window, none.")]
Include = Annotated[list[str], typer.Option(help="Only linears that match this pattern (*.down_proj). Repeatable.")]
Exclude = Annotated[list[str], typer.Option(help="Leave linears that match this pattern. Repeatable.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="Stored dtype: auto (the checkpoint's), float32, bfloat16, float16.")]
ComputeDtype = Annotated[str, typer.Option("--dtype", help="Computing dtype: auto, float32, bfloat16, float16.")]
Tokenizer = Annotated[str | None, typer.Option(help="A tokenizer in place of the model's own: a folder or a hub id.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with a model of a class of its own.")
]
Work = Annotated[
    Path | None, typer.Option(help="Folder for finished pieces of a long run; the same command resumes there.")
]
Against = Annotated[str | None, typer.Option(help="The dense model: measured beside --data, and writes samples.")]
MeasureOn = Annotated[list[str], typer.Option("--data", help="Measure perplexity on this text. Repeatable.")]
MeasureWindows = Annotated[
    int | None, typer.Option("--windows", min=1, help="Windows per corpus; the whole text without it.")
]
Mean = Annotated[
    str, typer.Option(help="Of perplexity: token (of the field) or window (D-Rank's, keeps the short tail).")
]
Results = Annotated[
    list[Path], typer.Option(help="What `eckart eval --json` or `eckart bench --json` printed. Repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output, nothing else there.")]


def parse_options(pairs: list[str]) -> dict[str, str]:
    """`["factorizer.damping=1e-4"]` to a mapping."""
    parsed = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--option {pair!r}: must look like factorizer.damping=1e-4.")
        parsed[key] = value
    return parsed


def unescape(text: str) -> str:
    """Line breaks and tabs that a shell cannot easily say."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
