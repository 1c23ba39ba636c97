"""The command line's application and its way out. Exit codes: 0 done, 2 the user's mistake, 1 else."""

import json
import sys
from typing import Annotated, Any

import typer

import eckart
from eckart.errors import EckartError, UserError

app = typer.Typer(
    name="eckart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make Hugging Face language models smaller by low-rank factorisation.",
)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if show:
        print(f"eckart {eckart.__version__}")
        raise typer.Exit


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
