"""Scores of a set of pictures by their features, each with an interval, held against a reference of the same network."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from jdiff.evaluate.distances import frechet_distance, inception_score, kernel_distance, precision_recall
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
    take them.
    """

    title: str
    pool: Moments
    spatial: Moments | None = None
    features: Features | None = None

    @classmethod
    def of(cls, title: str, features: Features) -> "Reference":
        """That of pictures' features."""
        spatial = None if features.spatial_ND is None else Moments.of(features.spatial_ND)
        return cls(title, Moments.of(features.pool_ND), spatial, features)


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

    ValueError for an unknown metric, or one that the reference or the network has nothing for.
    """
    found = {}
    pair = cache(lambda: _precision_recall(samples, reference))
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is unknown{nearest(metric, METRICS)}; there are {', '.join(METRICS)}")
        if metric in SHARES:
            value, count = pair()[SHARES.index(metric)]
            deviation = (value * (1 - value) / count) ** 0.5
        else:
            measure = _measure(metric, samples, reference)
            value, deviation = measure(samples), _resampled(measure, samples, resamples, seed)
        found[metric] = Score(value, value - 1.96 * deviation, value + 1.96 * deviation)
    return found


def _resampled(measure: Callable[[Features], float], samples: Features, resamples: int, seed: int) -> float:
    """The deviation of a measure over bootstrap sets; nan for fewer than two."""
    if resamples < 2:
        return float("nan")
    rng = np.random.default_rng(seed)
    sets = (rng.integers(len(samples), size=len(samples)) for _ in range(resamples))
    return float(np.std([measure(samples.rows(rows)) for rows in sets], ddof=1))


def _measure(metric: str, samples: Features, reference: Reference | None) -> Callable[[Features], float]:
    if metric == "is":
        return lambda z: inception_score(z.logits_NK, max(1, len(z) // SPLIT))[0]
    reference = _given(metric, reference)
    if metric == "fid":
        return lambda z: frechet_distance(reference.pool, Moments.of(z.pool_ND))
    if metric == "sfid":
        spatial = reference.spatial
        if samples.spatial_ND is None or spatial is None:
            raise ValueError(f"sfid needs maps of features, which {reference.title} or the network does not have")
        return lambda z: frechet_distance(spatial, Moments.of(np.asarray(z.spatial_ND)))
    pool_MD = _features(metric, reference)
    return lambda z: kernel_distance(z.pool_ND, pool_MD)


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
