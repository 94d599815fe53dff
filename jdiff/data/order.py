"""Which record stands in row r of step s: functions of (seed, s, r), with an epoch's order kept until the next ones.

Random numbers are counter-based: a generator is keyed by (seed, epoch) or by (seed, position in the stream).
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np


class Order(Protocol):
    """turns: how many batches may stand in for one that holds nothing readable, itself counted."""

    turns: int

    def candidates(self, step: int, row: int, turn: int = 0) -> Iterator[int]:
        """The record of a row, then those that replace it, each where the one before is broken."""
        ...


def generator(seed: int, key: int) -> np.random.Generator:
    """A fresh generator for (seed, key)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, key], np.uint64)))


def rekey(rng: np.random.Generator, key: int) -> None:
    """Sets a fresh Philox generator's second key: six times quicker than making one anew, which small records feel."""
    state: Any = rng.bit_generator.state
    state["state"]["key"][1], state["state"]["counter"][:] = key, 0
    state["buffer_pos"], state["has_uint32"] = 4, 0
    rng.bit_generator.state = state


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """An epoch's; its key is one that no position of the stream has."""
    return generator(seed, 2**64 - 1 - epoch)


class Shuffled:
    """All records in one stream: each epoch is a permutation, and a batch may hold the end of one and the start of the next."""

    turns = 1

    def __init__(self, size: int, batch_size: int, seed: int):
        self._size, self._batch_size, self._seed = size, batch_size, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}

    def candidates(self, step: int, row: int, turn: int = 0) -> Iterator[int]:
        """See `Order`."""
        epoch, place = divmod(step * self._batch_size + row, self._size)
        order = self._epochs.get(epoch)
        if order is None:
            order = epoch_generator(self._seed, epoch).permutation(self._size)
            self._epochs = {**dict(list(self._epochs.items())[-2:]), epoch: order}
        for attempt in range(self._size):
            yield int(order[(place + attempt) % self._size])


class ByBucket:
    """Every batch from one bucket, each bucket's last batch filled by going round; an epoch is all batches in random order.

    buckets_N: each record's bucket. A broken record is replaced from its own bucket, and a batch whose bucket holds nothing
    readable by the epoch's next.
    """

    def __init__(self, buckets_N: np.ndarray, batch_size: int, seed: int):
        self._members = [members for b in np.unique(buckets_N) if len(members := np.flatnonzero(buckets_N == b))]
        self._batch_size, self._seed = batch_size, seed
        batches = [(b, k) for b, members in enumerate(self._members) for k in range(-(-len(members) // batch_size))]
        self._batches = np.asarray(batches)
        self.turns = len(batches)
        self._epochs: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}

    def candidates(self, step: int, row: int, turn: int = 0) -> Iterator[int]:
        """See `Order`."""
        epoch, place = divmod(step, self.turns)
        members, batches = self._epoch(epoch)
        bucket, batch = batches[(place + turn) % self.turns]
        own = members[bucket]
        for attempt in range(len(own)):
            yield int(own[(batch * self._batch_size + row + attempt) % len(own)])

    def _epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Each bucket's members and the batches (turns, 2) of (bucket, number), in this epoch's order."""
        order = self._epochs.get(epoch)
        if order is None:
            rng = epoch_generator(self._seed, epoch)
            order = [rng.permutation(members) for members in self._members], rng.permutation(self._batches)
            self._epochs = {**dict(list(self._epochs.items())[-2:]), epoch: order}
        return order
