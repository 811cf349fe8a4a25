"""The command line: options in, one call, an exit code out. Imports no torch, so that --help answers quickly."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mla_convert.cli import (
    bench,
    convert,
    evaluate,
    export,
    gate,
    heal,
    inspect,
    plan,
    push,
    quantise,
    recipes,
    refresh,
    report,
    serve_check,
    sweep,
    verify,
)
from mla_convert.cli.launch import LOST, Said, follows, launched, settle_signals, started
from mla_convert.cli.terminal import is_verbose
from mla_convert.core.errors import (
    GateFailed,
    InputError,
    Interrupted,
    MlaConvertError,
    PeerLost,
    ReaderGone,
    ResourceError,
)
from mla_convert.core.words import drop_output, open_streams, say
from mla_convert.moved import callable_as_before

EXIT_CODES = (
    "Exit codes: 0 done, 1 a bug, 2 usage, 3 a gate failed, 4 bad input, 5 resources (disk, device, network), "
    "130 interrupted."
)
# Errors of the system for names that no file can have.
NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
# Base of all errors of the parser, in click or in the copy of click that newer versions of typer carry.
ParserError = typer.BadParameter.__base__


class DefaultGroup(TyperGroup):
    """`mla-convert SOURCE …` is `mla-convert convert SOURCE …`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Insert `convert` unless the first word is a command or an option of the application."""
        own = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        """Show the options of `convert`, which users look for first, below the list of commands."""
        super().format_help(ctx, formatter)
        convert = self.commands["convert"]
        with typer.Context(convert, info_name=f"{ctx.info_name} [convert]") as inner:
            convert.format_help(inner, formatter)


app = typer.Typer(
    cls=DefaultGroup,
    help="Retrofit Multi-head Latent Attention onto Hugging Face checkpoints: a smaller KV cache, at a measured loss.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        from mla_convert.core.runtime import versions

        installed = {"cuda": "none (this torch is built without)", **versions()}
        order = sorted(installed, key=lambda name: (name != "mla_convert", name == "cuda"))  # ours first, cuda last
        say("\n".join(f"{name} {installed[name]}" for name in order))
        raise typer.Exit


@app.callback()
def root(  # noqa: D103  (a docstring here would replace the application's help)
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    return


# In the order in which --help lists them.
for name, command, example in (
    ("convert", convert.convert, convert.EXAMPLE),
    ("heal", heal.heal, heal.EXAMPLE),
    ("quantize", quantise.quantize, quantise.EXAMPLE),
    ("sweep", sweep.sweep, sweep.EXAMPLE),
    ("plan", plan.plan, plan.EXAMPLE),
    ("inspect", inspect.inspect, inspect.EXAMPLE),
    ("recipes", recipes.recipes, recipes.EXAMPLE),
    ("verify", verify.verify, verify.EXAMPLE),
    ("refresh", refresh.refresh, refresh.EXAMPLE),
    ("eval", evaluate.evaluate, evaluate.EXAMPLE),
    ("bench", bench.bench, bench.EXAMPLE),
    ("gate", gate.gate, gate.EXAMPLE),
    ("export", export.export, export.EXAMPLE),
    ("serve-check", serve_check.serve_check, serve_check.EXAMPLE),
    ("push", push.push, push.EXAMPLE),
    ("report", report.report, report.EXAMPLE),
):
    app.command(name, epilog=f"Example: {example}\n\n{EXIT_CODES}")(command)


def main() -> None:
    """Entry point: every expected failure becomes one line on stderr and its exit code."""
    open_streams()
    settle_signals()
    try:
        code = _run()
    except ParserError as error:
        if not sys.argv[1:]:  # typer has shown the help
            sys.exit(error.exit_code)
        _fail(f"{error.format_message()} (--help lists the options)", error.exit_code)
    except ReaderGone as gone:
        drop_output()
        code = gone.exit_code
    except MlaConvertError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", Interrupted.exit_code)
    except OSError as error:
        drop_output()  # the error may be that of stdout
        code = InputError.exit_code if error.errno in NAMES else ResourceError.exit_code
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), code)
    except RecursionError:
        _fail("an input is nested too deep to be read: it is damaged, or not what it is named", InputError.exit_code)
    except Exception as error:
        again = "" if is_verbose() else "; run it again with -v to see where"
        _fail(f"this is a bug, please report it: {type(error).__name__}: {error}{again}", MlaConvertError.exit_code)
    _exit(code)


def _run() -> int | None:
    """Run the command, flush its output and return its exit code."""
    try:
        # In standalone mode the parser would print errors in several lines and exit by itself.
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGone from None
    except SystemExit as stop:  # the parser raises it when the reader of its help is gone
        if stop.code == 1:
            raise ReaderGone from None
        raise
    _print_if_untried()
    if code == Interrupted.exit_code and not isinstance(code, Said):  # typer turns Ctrl-C into it
        raise Interrupted("interrupted")
    return code


def _print_if_untried() -> None:
    """Print one line on stderr after a command that used a transformers newer than the newest that the tests ran with."""
    if not follows() and "transformers" in sys.modules and "mla_convert.core.runtime" in sys.modules:
        from mla_convert.core.runtime import untried

        if line := untried():
            say(f"mla-convert: {line}", err=True)


def _fail(message: str, code: int) -> None:
    if launched() and not _speaks():
        _exit(LOST if started() and isinstance(sys.exception(), PeerLost) else code)
    if is_verbose() and sys.exc_info()[0] not in (None, KeyboardInterrupt, GateFailed):
        traceback.print_exc()
    with contextlib.suppress(ReaderGone, OSError):
        say(f"mla-convert: {' '.join(message.split())}", err=True)
    _exit(code)


def _speaks() -> bool:
    """Whether this one of several processes prints its error: the first that fails."""
    if "torch" not in sys.modules:
        return not follows()
    from mla_convert.core.processes import first_to_fail

    # where a process was killed, the one that started it says so
    return not (started() and isinstance(sys.exception(), PeerLost)) and first_to_fail()


def _exit(code: int | None) -> None:
    if code and launched():  # the interpreter's end would wait for the other processes
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


callable_as_before(__name__)
