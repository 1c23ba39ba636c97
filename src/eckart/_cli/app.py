"""The command line's application and its way out.

Exit codes: 0 done, 2 the user's mistake, 1 else; 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 141 nobody reads the output.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import eckart
from eckart._cli import signals, streams, terminal
from eckart.errors import EckartError, UserError
from eckart.support.escaping import plain
from eckart.support.not_finite import to_json

log = logging.getLogger(__name__)

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
        terminal.say(f"eckart {eckart.__version__}")
        raise typer.Exit


def print_json(value: dict[str, Any]) -> None:
    streams.stdout.write(f"{to_json(value, indent=1)}\n")


class _Running:
    """The command that runs; what its options are says what a signal leaves."""

    context: typer.Context | None = None


def begin(context: typer.Context, count: int) -> int:
    """What every command begins with: how much it says, and a working folder that is there."""
    _Running.context = context
    if count:
        terminal.log_to_stderr(logging.INFO if count == 1 else logging.DEBUG)
    try:
        os.getcwd()
    except OSError:
        raise UserError("the working folder is gone; change to one that exists.") from None
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
                callback=begin,
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
    invoke = group.invoke
    group.invoke = lambda context: _shielded(invoke, context)
    return group


class _Ended(Exception):
    """A command ended by an error that click would take for something else; `cause` is the error."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


def _shielded(invoke: Any, context: Any) -> Any:
    try:
        return invoke(context)
    except (KeyboardInterrupt, EOFError, OSError) as error:
        raise _Ended(error) from error


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    streams.stdout.open()
    streams.stderr.open()
    terminal.log_to_stderr()
    _Running.context = None
    message, code = run()
    if message:
        streams.stderr.write(f"eckart: {plain(message, 2000)}\n")
    sys.exit(streams.close(code))


def run() -> tuple[str, int]:
    """Run the command of `sys.argv`; returns what is to be said of its end, and the exit code."""
    came: list[int] = []
    try:
        with signals.stoppable() as came:
            code = commands().main(prog_name="eckart", standalone_mode=False) or 0
            return interrupted(came) if code == 130 else ("", code)  # click's own, before a command had begun
    except UserError as error:
        return str(error), 2
    except (EckartError, MemoryError) as error:
        return str(error) or "out of memory; lower --length or --windows.", 1
    except _Ended as error:
        return interrupted(came) if isinstance(error.cause, KeyboardInterrupt) else broken(error.cause)
    except KeyboardInterrupt:
        return interrupted(came)
    except OSError as error:
        return broken(error)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors, whichever copy of click typer brings
            raise
        context = getattr(error, "ctx", None)
        where = f" See {context.command_path} --help." if context else ""
        return f"{' '.join(error.format_message().split()).rstrip('.')}.{where}", 2


def interrupted(came: Sequence[int]) -> tuple[str, int]:
    """What to say of a signal, the first of those that came."""
    number = came[0] if came else signal.SIGINT
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    return f"interrupted{by}; {kept()}", 128 + number


def broken(error: BaseException) -> tuple[str, int]:
    """What to say of an error of the system that nobody foresaw."""
    log.debug("where it came from:", exc_info=error)
    if isinstance(error, EOFError):
        return "a file ends before what it should hold; it is empty or cut off. -vv says where.", 1
    name, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
    text = reason or " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"{f'{name}: ' if name and reason else ''}{text}. -vv says where.", 1


def kept() -> str:
    """What is left of the command that was interrupted, and how to go on."""
    options = _Running.context.params if _Running.context else {}
    work, out = options.get("work"), options.get("out")
    if work is not None and _has_entries(Path(work)):
        return f"finished pieces are kept in {work}: run the same command again to go on."
    if _Running.context and _Running.context.info_name == "demo" and _has_entries(Path(str(out))):
        return f"the compressed model is in {out}, whole; what was to follow is missing."
    return "nothing was written."


def _has_entries(folder: Path) -> bool:
    try:
        return any(folder.expanduser().iterdir())
    except (OSError, RuntimeError):
        return False
