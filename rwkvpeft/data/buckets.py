"""``--length_buckets``: the documents of a batch, and of all ranks' batches of one step, have similar lengths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.data.rows import DocumentDataset
from rwkvpeft.data.sampling import mix, permute_many

# orders that are kept: of the pass that is drawn, and of the next one, which a batch at its end begins
_KEPT = 2


class Buckets:
    """The order in which documents are drawn, ``together`` of them at a time. Each pass holds every document once.

    The documents of a pass are sorted by length and cut into groups of ``together``; the groups come in a seeded order.
    Where a pass ends inside of a group, the shortest documents of this one and of the next share it. A pure function
    of the position.

    Args:
        together: rows that all ranks draw at once.
    """

    def __init__(self, documents: DocumentDataset, together: int) -> None:
        self._documents = documents
        self._together = together
        self._kept: dict[int, NDArray[np.int64]] = {}

    def index(self, position: int) -> int:
        """The row that is drawn at a position."""
        passed, place = divmod(position, self._documents.pass_rows)
        if passed not in self._kept:
            while len(self._kept) >= _KEPT:
                del self._kept[min(self._kept)]
            self._kept[passed] = self._order(passed)
        return int(self._kept[passed][place])

    def _order(self, passed: int) -> NDArray[np.int64]:
        documents, together = self._documents, self._together
        n = documents.pass_rows
        drawn = documents.indices(np.arange(passed * n, (passed + 1) * n, dtype=np.int64))
        # documents of one length stay in the order of their pass, so that they meet others in the next
        drawn = drawn[np.argsort(documents.lengths[drawn], kind="stable")]
        head = min(n, -passed * n % together)
        tail = (n - head) % together
        groups = drawn[head + tail :].reshape(-1, together)
        if documents.shuffle and len(groups):
            groups = groups[permute_many(np.arange(len(groups)), len(groups), mix(documents.seed, passed, 2))]
        return np.concatenate([drawn[:head], groups.ravel(), drawn[head : head + tail]])
