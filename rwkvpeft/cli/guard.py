"""How every command ends: an exit code, and for a user's mistake one message instead of a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from rwkvpeft.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def guarded(body: Callable[[], int], debug: bool = False) -> int:
    """Run a command's body and return the exit code of the process.

    A ``UserError`` is printed to standard error and gives 2, with its traceback when ``debug`` is set. Ctrl-C gives
    130. A reader that has gone away (``| head``) ends the command quietly with 141. ``SystemExit`` gives its own code.
    Any other exception is a defect and passes through with its traceback.
    """
    try:
        code = body()
        sys.stdout.flush()
    except UserError as error:
        if debug:
            traceback.print_exc()
        else:
            print(error.render(), file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the interpreter flushes standard output once more at exit and would complain there
        _discard_output()
        return EXIT_BROKEN_PIPE
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else EXIT_USER_ERROR
    return code


def _discard_output() -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return
