"""bitsandbytes, loaded when the first weight needs it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from rwkvpeft.errors import UserError


@functools.cache
def bitsandbytes_functions() -> Any:
    """The module ``bitsandbytes.functional``.

    Raises: UserError if the package is not installed or cannot be loaded.
    """
    try:
        with without_remarks():
            return import_module("bitsandbytes.functional")
    except ImportError as reason:
        raise UserError(
            "--quant int8, nf4 and fp4 need the package bitsandbytes",
            found=reason,
            fix="pip install 'rwkvpeft[bnb]', or --quant fp8, which needs no package",
        ) from reason


@contextmanager
def without_remarks() -> Generator[None, None, None]:
    """Inside the block bitsandbytes is imported without its advice about a download that nothing here would use."""
    remarks = logging.getLogger("bitsandbytes.backends.cpu.ops")
    remarks.addFilter(_is_of_use)
    try:
        yield
    finally:
        remarks.removeFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    # bitsandbytes looks for a matrix product of its own that is not used here, and warns where it is missing
    return "gemm_4bit_forward from kernels-community" not in str(record.msg)
