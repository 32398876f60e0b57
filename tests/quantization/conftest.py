"""The formats under test, each named as its test id shows it."""

from __future__ import annotations

import pytest

from rwkvpeft.quantization.format import build_format

KINDS = ("int8", "nf4", "nf4 double", "fp4", "fp4 double", "fp8")


@pytest.fixture(params=KINDS)
def format(request):
    """Every format; those that bitsandbytes packs are skipped where it is missing."""
    name, _, double = request.param.partition(" ")
    if name != "fp8":
        pytest.importorskip("bitsandbytes")
    return build_format(name, double=bool(double))
