"""Many strings in one buffer of bytes, so that a million cost little and are sent to a worker quickly."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jdiff.npz import Npz


class Packed:
    """An immutable list of byte strings: `buffer` and the N + 1 `offsets` (int64) that cut it."""

    def __init__(self, items: Iterable[bytes]):
        items = list(items)
        self.offsets = np.cumsum([0, *map(len, items)])
        self.buffer = b"".join(items)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.buffer[self.offsets[index] : self.offsets[index + 1]]


class Texts:
    """One or several texts for each of N records; all texts are numbered through.

    texts: a list for each record. ValueError for a record without any.
    """

    def __init__(self, texts: Iterable[Sequence[str]]):
        flat, counts = [], []
        for own in texts:
            counts.append(len(own))
            flat += [text.encode() for text in own]
        if 0 in counts:
            raise ValueError(f"record {counts.index(0)} has no text")
        self._starts, self._flat = np.cumsum([0, *counts]), Packed(flat)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def numbers(self, index: int) -> range:
        """The numbers of a record's texts."""
        return range(int(self._starts[index]), int(self._starts[index + 1]))

    def text(self, number: int) -> str:
        """The text of that number."""
        return self._flat[number].decode()

    def of(self, index: int) -> list[str]:
        """All of a record's texts."""
        return [self.text(number) for number in self.numbers(index)]

    def draw(self, index: int, rng: np.random.Generator) -> int:
        """The number of one of a record's texts; `rng` is left as it was where there is only one."""
        numbers = self.numbers(index)
        return numbers[int(rng.integers(len(numbers)))] if len(numbers) > 1 else numbers[0]

    def digest(self) -> bytes:
        """What a fingerprint takes in: the bytes of everything held."""
        return self._flat.buffer + self._flat.offsets.tobytes() + self._starts.tobytes()

    def save(self, path: Path) -> None:
        """Writes an .npz, which holds the same bytes for the same texts."""
        buffer = np.frombuffer(self._flat.buffer, np.uint8)
        with path.open("wb") as file:
            np.savez(file, buffer=buffer, offsets=self._flat.offsets, starts=self._starts)

    @staticmethod
    def load(path: Path) -> "Texts":
        """What `save` wrote; OSError or ValueError when it is something else."""
        texts = Texts([])
        try:
            with Npz(path) as arrays:
                texts._flat.buffer = arrays["buffer"].tobytes()
                texts._flat.offsets, texts._starts = arrays["offsets"], arrays["starts"]
            whole = (len(texts._flat.buffer), len(texts._flat)) == (texts._flat.offsets[-1], texts._starts[-1])
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name} holds something else: {error}") from error
        if not whole:
            raise ValueError(f"{path.name} holds something else: its parts do not fit together")
        return texts


def draw_one(texts: Sequence[str], rng: np.random.Generator) -> str:
    """One of a record's texts; `rng` is left as it was where there is only one."""
    return texts[int(rng.integers(len(texts)))] if len(texts) > 1 else texts[0]
