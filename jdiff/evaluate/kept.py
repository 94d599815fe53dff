"""Features on disk, a file a batch: a scoring that was killed goes on where it was."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jdiff.evaluate.features import Features, Network
from jdiff.npz import Npz
from jdiff.pipelines.kept import file_of, keep, place_of

log = logging.getLogger(__name__)


def kept_features(
    network: Network,
    batches: Callable[[int], Iterable[np.ndarray]],
    folder: Path | None,
    facts: Mapping[str, Any],
    prompts: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Features:
    """`network.features` of all pictures, each batch's kept in a folder below `folder` as soon as it is made; None keeps nothing.

    batches: the number of a picture -> the pictures from there on, in the same batches whenever it is asked. facts: all that the
    pictures depend on; what lies there of the same facts and network is read, and not made again.
    """
    if folder is None:
        return network.features(batches(0), mesh, prompts)
    text_ND = network.texts(prompts) if network.texts and prompts else None
    facts = {**facts, "network": network.title}
    place = place_of(folder, facts)
    parts = list(_read(place, network.outputs))
    done = sum(len(part["pool_ND"]) for part in parts)
    if done:
        log.info("%d pictures' features are in %s", done, place)
    for part in network.parts(batches(done), mesh):
        keep(file_of(place, done, "npz"), facts, lambda file, part=part: np.savez(file, allow_pickle=False, **part))
        parts.append(part)
        done += len(part["pool_ND"])
    return network.joined(parts, text_ND)


def _read(place: Path, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """The batches that are there, up to the first that is missing or damaged."""
    done = 0
    while (path := file_of(place, done, "npz")).is_file():
        try:
            with Npz(path) as file:
                part = {name: file[name] for name in names}
        except (ValueError, KeyError) as error:
            log.warning("%s is damaged, and made again: %s", path, error)
            return
        yield part
        done += len(part["pool_ND"])
