"""How every command ends: an exit code, and for a user's mistake one message instead of a traceback."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable

from rwkvpeft.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_REQUIREMENTS = ("torch", "numpy", "pytorch_lightning", "yaml", "tqdm", "pyrwkv_tokenizer")


def guarded(body: Callable[[], int | None], debug: bool = False) -> int:
    """Run a command's body and return the exit code of the process.

    A ``UserError`` is printed to standard error and gives 2, with its traceback when ``debug`` is set; so does a
    requirement of this package that is not installed, a file that the system refuses, and a lack of memory. Ctrl-C
    gives 130. A reader that has gone away (``| head``) ends the command quietly with 141. ``SystemExit`` gives its own
    code; 2 for a text, which is printed. Any other exception is a defect and passes through with its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # the name of a file may be no text in any encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = body() or 0
        sys.stdout.flush()
    except UserError as error:
        return _refuse(error, debug)
    except ModuleNotFoundError as missing:
        module = (missing.name or "").partition(".")[0]
        if module not in _REQUIREMENTS or missing.name != module:
            raise
        fix = "source .venv/bin/activate, or pip install -e ."
        return _refuse(UserError(f"{module} is not installed for this Python", found=sys.executable, fix=fix), debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the interpreter flushes standard output once more at exit and would complain there
        _discard_output()
        return EXIT_BROKEN_PIPE
    except MemoryError as reason:
        found = str(reason) or None
        return _refuse(UserError("there is not enough memory", found=found, fix="a larger machine"), debug)
    except OSError as reason:
        # a file somebody named, in a folder they may not read or under a name no system takes
        if reason.filename is None:
            raise
        return _refuse(UserError(f"cannot use {reason.filename}", found=reason.strerror, fix="check the path"), debug)
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else EXIT_USER_ERROR
    return code


def _refuse(error: UserError, debug: bool) -> int:
    """Print a message, or the traceback of the exception that is being handled; returns the exit code."""
    if debug:
        traceback.print_exc()
    else:
        print(error.render(), file=sys.stderr)
    return EXIT_USER_ERROR


def _discard_output() -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return
