"""Training rows that are read one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset


class Endless(IterableDataset[Any]):
    """A stream read over and over, shuffled anew each time.

    The Trainer counts the steps. Where a stream ended before they do, it would begin a new epoch in the middle of an
    accumulated batch, each process at another step, and could not find the place again when it resumes.

    Args:
        stream: An iterable data set of `datasets`.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        """The rows; none at all where a loading process has no share of the files."""
        for number in itertools.count():
            self.stream.set_epoch(number)
            rows = 0
            for row in self.stream:
                rows += 1
                yield row
            if rows == 0:
                return
