"""Pictures set apart, for numbers that training does not flatter."""

import logging
from typing import Any

import numpy as np

from jdiff import data
from jdiff.data import Source

log = logging.getLogger(__name__)


def heldout_records(config: Any, source: Source) -> dict[str, np.ndarray]:
    """heldout.count records spread evenly over those set apart, stacked: `image`, uint8 (N, H, W, 3), and `label`.

    Those of heldout.path, or of openmoji what data.split=train leaves; else of the source itself, which is said aloud. DataError
    when none can be read.
    """
    settings = config.data
    if settings.name == "openmoji" and settings.split == "train":
        source = data.open_source("openmoji", image_size=settings.image_size, split="heldout", only=settings.only)
    elif config.heldout.path:
        source = data.open_source(settings.name, path=config.heldout.path, image_size=settings.image_size)
    else:
        log.warning("what is measured is of pictures that are trained on: set heldout.path to others")
    count, rng = min(config.heldout.count, len(source)), np.random.default_rng(0)
    found = []
    for index in np.linspace(0, len(source) - 1, count).astype(int):
        try:
            record = source.read(int(index), False, rng)
            found.append((record["image"], record["label"]))
        except data.BrokenRecord as error:
            log.warning("held-out picture skipped: %s: %s", error.where, error.reason)
    if not found:
        raise data.DataError("none of the held-out pictures can be read")
    images, labels = zip(*found, strict=True)
    return {"image": np.stack(images), "label": np.asarray(labels, np.int32)}
