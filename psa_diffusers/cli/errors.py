"""How a command fails: one or two plain lines on stderr, an exit code, and the traceback only with ``--debug``."""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


class CommandError(Exception):
    """The command could not do its work. The message says what to do about it. Exit code 1."""

    exit_code = FAILED


class WrongUsageError(CommandError):
    """What the user asked for cannot be done as asked. Exit code 2."""

    exit_code = WRONG_USAGE


class InterruptedRunError(CommandError):
    """Ctrl-C. Exit code 130."""

    exit_code = INTERRUPTED


@contextmanager
def as_wrong_usage(*kinds: type[Exception], hint: str = "") -> Iterator[None]:
    """Turn the library's errors of these kinds into :class:`WrongUsageError`, with a hint after the message."""
    try:
        yield
    except kinds as error:
        message = first_line(error)
        raise WrongUsageError(f"{message} {hint}".strip()) from error


def first_line(error: BaseException, limit: int = 500) -> str:
    """The error's message as one line of at most ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def run_command(name: str, app: Callable[..., Any], arguments: Sequence[str] | None = None) -> int:
    """Run a typer app and return the exit code: 0 ok, 1 failed, 2 wrong usage, 130 interrupted.

    With ``--json`` among the arguments, an error is also printed as JSON, so that stdout always holds JSON.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings():
            if not debug:
                for kind in (FutureWarning, DeprecationWarning):  # of the libraries below; nothing a user can act on
                    warnings.simplefilter("ignore", kind)
            result = app(args=arguments, prog_name=name, standalone_mode=False, obj=arguments)
        if result == INTERRUPTED:  # newer typers catch Ctrl-C themselves
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt as error:
        return _report(name, InterruptedRunError("stopped; finished files were kept."), error, arguments)
    except Exception as error:
        return _report(name, error, error, arguments)


def _report(name: str, error: Exception, cause: BaseException, arguments: Sequence[str]) -> int:
    code, message = explain(name, error)
    if code == INTERRUPTED:
        # An interrupt that passed through an exec, as while libraries are imported, is "unhandled" to Python from then
        # on, and ends a `python -m` by a signal in place of the exit code. The next exec clears that.
        exec("")
    if "--debug" in arguments:
        typer.echo("".join(traceback.format_exception(cause)), err=True)
    if os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
        return code  # one of several processes, of which the first speaks
    typer.echo(f"{name}: {message}", err=True)
    if "--json" in arguments:
        typer.echo(json.dumps({"error": message, "exit_code": code}))
    return code


def explain(name: str, error: Exception) -> tuple[int, str]:
    """Exit code and message. Parsing errors are known by their methods, as some typers bring a click of their own."""
    if isinstance(error, CommandError):
        return error.exit_code, str(error)
    if hasattr(error, "format_message"):
        return int(
            getattr(error, "exit_code", WRONG_USAGE)
        ), f"{error.format_message().rstrip('.')}. See {name} --help."
    if type(error).__name__ == "Abort":
        return INTERRUPTED, "stopped; finished files were kept."
    kind, message = type(error).__name__, first_line(error)
    what = kind if message == kind else f"{kind}: {message}"
    return FAILED, f"{what.rstrip('.')}. Add --debug for the traceback."


def command_line(name: str, arguments: Sequence[str]) -> str:
    """The command as one could type it again."""
    return shlex.join([name, *arguments])
