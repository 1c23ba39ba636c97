"""The command line's application and its way out. Exit codes: 0 done, 2 the user's mistake, 1 else."""

import logging
import sys
from typing import Annotated, Any

import typer

import eckart
from eckart._cli import terminal
from eckart.errors import EckartError, UserError
from eckart.support.not_finite import to_json

app = typer.Typer(
    name="eckart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make Hugging Face language models smaller by low-rank factorisation.",
)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if show:
        print(f"eckart {eckart.__version__}")
        raise typer.Exit


def print_json(value: dict[str, Any]) -> None:
    print(to_json(value, indent=1))


def set_verbosity(count: int) -> int:
    if count:
        terminal.log_to_stderr(logging.INFO if count == 1 else logging.DEBUG)
    return count


def commands() -> Any:
    """The commands as a click group, each with the option `--verbose`, which no command's own file declares."""
    carrier = typer.Typer(add_completion=False)

    @carrier.command()
    def only(
        verbose: Annotated[
            int,
            typer.Option(
                "-v",
                "--verbose",
                count=True,
                callback=set_verbosity,
                expose_value=False,
                show_default=False,
                help="Say on standard error what is being done; -vv says more.",
            ),
        ] = 0,
    ) -> None: ...

    carried: Any = typer.main.get_command(carrier)
    group: Any = typer.main.get_command(app)
    for command in group.commands.values():
        command.params += [option for option in carried.params if option.name == "verbose"]
    return group


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    try:
        code = commands().main(prog_name="eckart", standalone_mode=False)
    except UserError as error:
        fail(str(error), 2)
    except (EckartError, MemoryError) as error:
        fail(str(error) or "out of memory; lower --length or --windows.", 1)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted; nothing was written.", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors, whichever copy of click typer brings
            raise
        context = getattr(error, "ctx", None)
        where = f" See {context.command_path} --help." if context else ""
        fail(f"{' '.join(error.format_message().split()).rstrip('.')}.{where}", 2)
    sys.exit(code or 0)


def fail(message: str, code: int) -> None:
    sys.stderr.write(f"eckart: {message}\n")
    sys.exit(code)
