"""Fine-tune RWKV v5, v6 and v7 language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkvpeft.checkpoints.load import load_model as load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import: --help must not wait for it
    if name == "load_model":
        from rwkvpeft.checkpoints.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
