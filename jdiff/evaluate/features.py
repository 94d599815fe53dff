"""Pictures to the features that scores compare: one interface over the networks that make them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jdiff import sharding
from jdiff.loading import on
from jdiff.pipelines import gather
from jdiff.pipelines.rows import spread

ROWS = 32
"""Pictures that a device has in work at once."""


@dataclasses.dataclass(frozen=True)
class Features:
    """Of N pictures, each array None where the network makes none.

    logits_NK: of its classes; spatial_ND: of a map, for sFID; text_ND: what `Network.texts` makes of each picture's prompt.
    network: its title.
    """

    pool_ND: np.ndarray
    logits_NK: np.ndarray | None = None
    spatial_ND: np.ndarray | None = None
    text_ND: np.ndarray | None = None
    network: str = dataclasses.field(default="", kw_only=True)

    def __len__(self) -> int:
        return len(self.pool_ND)


@dataclasses.dataclass(frozen=True)
class Network:
    """What makes features of pictures.

    title: what it is, with a hash of its weights, and how pictures are resized for it; only scores of one title compare.
    apply: (params, uint8 (B, H, W, 3)) -> arrays, traced. outputs: which of `Features`' fields they are. texts: prompts -> their
    places (N, D) in the space of the pool, where it has them; ValueError for one that it cannot read whole.
    """

    title: str
    params: Any
    apply: Callable[[Any, jax.Array], tuple[jax.Array, ...]]
    outputs: tuple[str, ...] = ("pool_ND", "logits_NK")
    texts: Callable[[Sequence[str]], np.ndarray] | None = None

    def features(
        self, batches: Iterable[np.ndarray], mesh: Mesh | None = None, prompts: Sequence[str] = ()
    ) -> Features:
        """Of all pictures, uint8 (B, H, W, 3) each. prompts: one a picture, for scores by texts, and read first."""
        text_ND = self.texts(prompts) if self.texts and prompts else None
        return self.joined(list(self.parts(batches, mesh)), text_ND)

    def parts(self, batches: Iterable[np.ndarray], mesh: Mesh | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The features of each batch, by their field of `Features`."""
        rows = ({"image": batch} for batch in batches)
        yield from by_rows(self._named, self.params, rows, mesh or sharding.make_mesh())

    @cached_property
    def _named(self) -> Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]:
        """One function for all calls, so that it compiles once."""
        return lambda params, rows: dict(zip(self.outputs, self.apply(params, rows["image"]), strict=True))

    def joined(self, parts: Sequence[dict[str, np.ndarray]], text_ND: np.ndarray | None = None) -> Features:
        """All `parts` as one. ValueError when there are none, or texts for more or fewer pictures."""
        count = sum(len(part["pool_ND"]) for part in parts)
        if not count:
            raise ValueError("there are no pictures to score")
        if text_ND is not None and len(text_ND) != count:
            raise ValueError(f"there are {len(text_ND)} prompts for {count} pictures")
        whole = {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}
        return Features(**whole, text_ND=text_ND, network=self.title)


def by_rows(
    apply: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    at_once: int = ROWS,
) -> Iterator[dict[str, np.ndarray]]:
    """What `apply`, traced, makes of each batch's rows: a batch goes over the devices, `at_once` rows to each at a time."""
    params, run = on(mesh, params), _jitted(apply, mesh)
    size = at_once * mesh.size
    for batch in batches:
        count = len(next(iter(batch.values())))
        found, waiting = [], None
        for start in range(0, count, size):
            rows = {name: padded(array[start : start + size], size) for name, array in batch.items()}
            made = run(params, spread(mesh, rows))
            found += [] if waiting is None else [jax.tree.map(gather, waiting)]  # while the devices have the next
            waiting = made
        found.append(jax.tree.map(gather, waiting))
        yield {name: np.concatenate([piece[name] for piece in found])[:count] for name in found[0]}


@lru_cache(maxsize=4)
def _jitted(apply: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    return jax.jit(apply, out_shardings=sharding.replicated(mesh))


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows repeated to `size` of them, so that the last batch does not compile anew."""
    return rows[np.arange(size) % len(rows)]
