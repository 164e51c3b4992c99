"""The command line: argv -> Recipe -> call -> print. Heavy imports wait until a command runs."""

import logging
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from slimlm.cli.bench import bench_command
from slimlm.cli.compress import compress_command, recover_command, rotate_command
from slimlm.cli.evaluate import eval_command
from slimlm.cli.inspect import inspect_command
from slimlm.cli.others import methods_command, models_command, pack_command, recipes_command, unpack_command
from slimlm.cli.running import Stopped
from slimlm.cli.several import begin_as_one_of_several, end_as_one_of_several
from slimlm.errors import SlimlmError, out_of_memory
from slimlm.recipe import FIELDS, OF_RECOVERY
from slimlm.report.streams import sturdy_streams, to_nowhere
from slimlm.started import own_rank, world_size

app = typer.Typer(
    name="slimlm",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make a trained language model smaller; get back a checkpoint that stock transformers loads.\n\n"
    "Start with `slimlm compress --model llama --sparsity 0.25`: it needs no network, and ends with what was lost.",
)
app.command("compress")(compress_command)
app.command("rotate")(rotate_command)
app.command("recover")(recover_command)
app.command("eval")(eval_command)
app.command("bench")(bench_command)
app.command("inspect")(inspect_command)
app.command("pack")(pack_command)
app.command("unpack")(unpack_command)
app.command("models")(models_command)
app.command("methods")(methods_command)
app.command("recipes")(recipes_command)

OF_RECIPES = ("compress", "rotate", "recover")  # commands that have --set
UNREAD = 141  # what a shell reports of a program that SIGPIPE ended, as `head` does to whatever writes on


def main() -> None:
    """Entry point of the console command.

    Exit code 2 for a user's mistake, 1 for a failed run, 128 and its number for a signal: 130 is Ctrl-C, 141 says that
    nobody read the output to its end. What was written to files stands then. Of several processes one says what ended
    them.
    """
    sturdy_streams()
    level = logging.ERROR if own_rank() else logging.WARNING  # what several processes have to say, the first one says
    logging.basicConfig(level=level, format="slimlm: %(levelname)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _heed_signals()
    if world_size() > 1:
        begin_as_one_of_several()
    try:
        with out_of_memory("use a larger machine or a smaller model"):
            code = app(standalone_mode=False)
        sys.stdout.flush()
    except Stopped as stopped:
        _fail("interrupted", 128 + stopped.args[0])
    except SlimlmError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        _leave_unread()
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # rich and typer leave on their own
            _leave_unread()
        raise
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except Exception as error:
        message = getattr(error, "format_message", None)  # what typer says of a flag or value it does not know
        if message is None and world_size() > 1:
            end_as_one_of_several("", 1)
        if message is None:
            raise
        _fail(f"{message()} ({_instead(error)})", 2)
    sys.exit(code)


def _instead(error: Exception) -> str:
    """What to do about a flag that a command does not know."""
    name = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
    command = getattr(getattr(error, "ctx", None), "info_name", "")
    if name in OF_RECOVERY and command == "compress":
        return "`slimlm recover` has it"
    return f"try --set {name}=VALUE" if name in FIELDS and command in OF_RECIPES else "see --help"


def _heed_signals() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _stop)


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


def _fail(message: str, code: int) -> NoReturn:
    if world_size() > 1:
        end_as_one_of_several(message, code)
    print(f"slimlm: {message}", file=sys.stderr)
    sys.exit(code)


def _leave_unread() -> NoReturn:
    to_nowhere(sys.stdout)  # what is still in its buffer would fail once more, on the way out
    sys.exit(UNREAD)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import PackageNotFoundError, version

        from slimlm import __version__

        print(f"slimlm {__version__}")
        for package in ("torch", "transformers", "accelerate"):
            try:
                print(package, version(package))
            except PackageNotFoundError:
                print(package, "is not installed")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version, and those of what a bug may be in."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
