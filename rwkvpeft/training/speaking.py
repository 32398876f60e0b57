"""Who speaks to the user during a run, and what of Lightning's advice is kept back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.utilities.warnings import PossibleUserWarning
from tqdm import tqdm


def spoken_once(report: Callable[[str], None]) -> Callable[[str], None]:
    """Only the first process speaks, and never into a progress bar."""

    def say(text: str) -> None:
        if is_first_process():
            with tqdm.external_write_mode():
                report(text)

    return say


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


@contextmanager
def quiet_lightning() -> Generator[None, None, None]:
    """Keep Lightning's advice (workers, devices, loggers) from the user; errors pass."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
        # what DeepSpeed still calls
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        # a block's state has views of its activations, which nothing writes to
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
