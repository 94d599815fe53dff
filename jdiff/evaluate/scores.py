"""Scores of a set of pictures by their features, each with an interval, held against a reference of the same network."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from jdiff.evaluate.distances import frechet_distance, inception_score, kernel_distances, precision_recall
from jdiff.evaluate.features import Features
from jdiff.evaluate.moments import Moments
from jdiff.tree import nearest

SHARES = ("precision", "recall")
METRICS = ("fid", "sfid", "kid", "is", *SHARES)
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


def scores(
    samples: Features,
    reference: Reference | None,
    metrics: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Score]:
    """Each metric of `METRICS` that is asked for. reference: not needed for `is` alone.

    The interval is 1.96 deviations to either side: over `resamples` bootstrap sets of the samples' rows (none for 0), the
    reference staying as it is; precision and recall have a share's own.

    ValueError for an unknown metric, one that the reference or the network has nothing for, or a reference by another network.
    """
    if reference and reference.network and samples.network and reference.network != samples.network:
        raise ValueError(
            f"{reference.title} holds features of {reference.network}, and the samples' are of {samples.network}: "
            "they do not compare"
        )
    found, rng, everything = {}, np.random.default_rng(seed), np.arange(len(samples))
    sets = [everything, *(rng.choice(everything, len(samples)) for _ in range(resamples))]
    pair = cache(lambda: _precision_recall(samples, reference))
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is unknown{nearest(metric, METRICS)}; there are {', '.join(METRICS)}")
        if metric in SHARES:
            value, count = pair()[SHARES.index(metric)]
            deviation = (value * (1 - value) / count) ** 0.5
        else:
            value, *others = _measure(metric, samples, reference)(sets)
            deviation = float(np.std(others, ddof=1)) if len(others) > 1 else float("nan")
        found[metric] = Score(value, value - 1.96 * deviation, value + 1.96 * deviation)
    return found


def _measure(metric: str, samples: Features, reference: Reference | None) -> Callable[[list[np.ndarray]], list[float]]:
    """A function of sets of the samples' rows: the metric of each."""
    if metric == "is":
        logits_NK = samples.logits_NK
        return lambda sets: [inception_score(logits_NK[rows], max(1, len(rows) // SPLIT))[0] for rows in sets]
    reference = _given(metric, reference)
    if metric == "kid":
        pool_MD = _features(metric, reference)
        counts = lambda sets: np.stack([np.bincount(rows, minlength=len(samples)) for rows in sets])  # noqa: E731
        return lambda sets: kernel_distances(samples.pool_ND, pool_MD, counts(sets))
    moments, features_ND = (
        (reference.pool, samples.pool_ND) if metric == "fid" else (reference.spatial, samples.spatial_ND)
    )
    if moments is None or features_ND is None:
        raise ValueError(f"sfid needs maps of features, which {reference.title} or the network does not have")
    return lambda sets: [frechet_distance(moments, Moments.of(features_ND[rows])) for rows in sets]


def _precision_recall(samples: Features, reference: Reference | None) -> list[tuple[float, int]]:
    """Both shares, each with how many pictures it is a share of."""
    pool_MD = _features("precision", reference)
    return list(zip(precision_recall(samples.pool_ND, pool_MD), (len(samples), len(pool_MD)), strict=True))


def _features(metric: str, reference: Reference | None) -> np.ndarray:
    reference = _given(metric, reference)
    if reference.features is None:
        raise ValueError(f"{metric} needs the reference's pictures, and {reference.title} holds moments alone")
    return reference.features.pool_ND


def _given(metric: str, reference: Reference | None) -> Reference:
    if reference is None:
        raise ValueError(f"{metric} compares with a reference: give one")
    return reference
