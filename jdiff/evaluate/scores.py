"""Scores of a set of pictures by their features, each with an interval, held against a reference of the same network."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jdiff.evaluate.distances import clip_score, frechet_distance, inception_score, kernel_distances, precision_recall
from jdiff.evaluate.features import Features, Network
from jdiff.evaluate.moments import Moments
from jdiff.tree import nearest

SHARES = ("precision", "recall")
OF_PICTURES = ("kid", *SHARES)
"""Metrics that take the features of a reference's pictures, where its moments do not do."""
ALONE = ("is", "clip")
"""Metrics of the samples alone."""
METRICS = ("fid", "sfid", *ALONE, *OF_PICTURES)
PAIRED = ("psnr", "ssim", "lpips")
"""Metrics of a picture and its original, which take no features: see `reconstruction`."""
NEEDS = {
    "is": ("logits_NK", "the logits of classes"),
    "sfid": ("spatial_ND", "maps of features"),
    "clip": ("text_ND", "texts beside pictures"),
}
"""Metric -> the features that it takes beside the pool, and what they are."""
RESAMPLES = 20
SPLIT = 5000
"""Rows that the Inception score is customarily taken of."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What pictures are held against, by the features of one network.

    pool, spatial: moments of features; features: the features themselves, where they are there, as kid, precision and recall
    take them. network: its title, or "" where that is not known.
    """

    title: str
    pool: Moments
    spatial: Moments | None = None
    features: Features | None = None
    network: str = ""

    @classmethod
    def of(cls, title: str, features: Features) -> "Reference":
        """That of pictures' features."""
        spatial = None if features.spatial_ND is None else Moments.of(features.spatial_ND)
        return cls(title, Moments.of(features.pool_ND), spatial, features, features.network)


@dataclasses.dataclass(frozen=True)
class Score:
    """A value, and its 95 % interval, nan where it was not resampled."""

    value: float
    low: float
    high: float


def check_metrics(
    metrics: Sequence[str], reference: str | None, *, pictures: bool = True, network: Network | None = None
) -> None:
    """ValueError for a metric that is unknown, or that the network, or a reference of this title, with pictures or without,
    has nothing for."""
    for metric in metrics:
        if metric in PAIRED:
            raise ValueError(f"{metric} compares picture by picture, and there are no originals")
        if metric not in METRICS:
            known = (*METRICS, *PAIRED)
            raise ValueError(f"metric {metric!r} is unknown{nearest(metric, known)}; there are {', '.join(known)}")
        if metric not in ALONE and reference is None:
            raise ValueError(f"{metric} compares with a reference: give one")
        if metric in OF_PICTURES and not pictures:
            raise ValueError(f"{metric} needs the reference's pictures, and {reference} holds moments alone")
        field, what = NEEDS.get(metric, ("pool_ND", ""))
        if network and field not in (*network.outputs, *(("text_ND",) if network.texts else ())):
            raise ValueError(f"{metric} takes {what}, which {network.title} does not have: leave it out of the metrics")


def check_network(reference: Reference, title: str) -> None:
    """ValueError where the reference is known to be of another network than the one of this title."""
    if reference.network and title and reference.network != title:
        raise ValueError(
            f"{reference.title} holds features of {reference.network}, and the samples' are of {title}: they do not compare"
        )


def scores(
    samples: Features,
    reference: Reference | None,
    metrics: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Score]:
    """Each metric of `METRICS` that is asked for. reference: not needed for those of `ALONE`.

    The interval is 1.96 deviations to either side: over `resamples` bootstrap sets of the samples' rows (none for 0), the
    reference staying as it is; precision and recall have a share's own.

    ValueError for an unknown metric, one that the reference or the network has nothing for, or a reference by another network.
    """
    if reference:
        check_metrics(metrics, reference.title, pictures=reference.features is not None)
        check_network(reference, samples.network)
    else:
        check_metrics(metrics, None)
    found, rng, everything = {}, np.random.default_rng(seed), np.arange(len(samples))
    sets = [everything, *(rng.choice(everything, len(samples)) for _ in range(resamples))]
    pair = cache(lambda: _precision_recall(samples, reference))
    for metric in metrics:
        if metric in SHARES:
            value, count = pair()[SHARES.index(metric)]
            deviation = (value * (1 - value) / count) ** 0.5
        else:
            value, *others = _values(metric, samples, reference, sets)
            deviation = float(np.std(others, ddof=1)) if len(others) > 1 else float("nan")
        found[metric] = Score(value, value - 1.96 * deviation, value + 1.96 * deviation)
    return found


def write_scores(path: Path, facts: Mapping[str, Any], results: Mapping[str, Score]) -> None:
    """Adds a line to a scores.jsonl: what the scores depend on, and each as [value, low, high]. A line that is there stays one."""
    found = {name: [score.value, score.low, score.high] for name, score in results.items()}
    line = json.dumps({**facts, **found})
    if not path.exists() or line not in path.read_text().splitlines():
        with path.open("a") as file:
            file.write(f"{line}\n")


def _values(metric: str, samples: Features, reference: Reference | None, sets: list[np.ndarray]) -> list[float]:
    """The metric of each of these sets of the samples' rows."""
    if metric == "is":
        logits_NK = _needed(metric, samples)
        return [inception_score(logits_NK[rows], max(1, len(rows) // SPLIT))[0] for rows in sets]
    if metric == "clip":
        score_N = clip_score(samples.pool_ND, _needed(metric, samples))
        return [float(score_N[rows].mean()) for rows in sets]
    assert reference is not None
    if metric == "kid":
        counts_RN = np.stack([np.bincount(rows, minlength=len(samples)) for rows in sets])
        return kernel_distances(samples.pool_ND, _pool(reference), counts_RN)
    if metric == "fid":
        moments, features_ND = reference.pool, samples.pool_ND
    else:
        moments, features_ND = reference.spatial, _needed(metric, samples)
    if moments is None:
        raise ValueError(f"{metric} takes {NEEDS[metric][1]}, which {reference.title} does not have")
    return [frechet_distance(moments, Moments.of(features_ND[rows])) for rows in sets]


def _needed(metric: str, samples: Features) -> np.ndarray:
    """The features that a metric takes beside the pool."""
    field, what = NEEDS[metric]
    if (found := getattr(samples, field)) is None:
        raise ValueError(f"{metric} takes {what}, which the samples do not have")
    return found


def _precision_recall(samples: Features, reference: Reference | None) -> list[tuple[float, int]]:
    """Both shares, each with how many pictures it is a share of."""
    assert reference is not None
    pool_MD = _pool(reference)
    return list(zip(precision_recall(samples.pool_ND, pool_MD), (len(samples), len(pool_MD)), strict=True))


def _pool(reference: Reference) -> np.ndarray:
    assert reference.features is not None
    return reference.features.pool_ND
