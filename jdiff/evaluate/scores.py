"""Scores of a set of pictures by their features, each with an interval, held against a reference of the same network."""

import dataclasses
from collections.abc import Sequence
from functools import cache

import numpy as np

from jdiff.evaluate.distances import frechet_distance, inception_score, kernel_distances, precision_recall
from jdiff.evaluate.features import Features
from jdiff.evaluate.moments import Moments
from jdiff.tree import nearest

SHARES = ("precision", "recall")
OF_PICTURES = ("kid", *SHARES)
"""Metrics that take the features of a reference's pictures, where its moments do not do."""
METRICS = ("fid", "sfid", "is", *OF_PICTURES)
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


def check_metrics(metrics: Sequence[str], reference: str | None, *, pictures: bool = True) -> None:
    """ValueError for a metric that is unknown, or that a reference of this title, with pictures or without, has nothing for."""
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is unknown{nearest(metric, METRICS)}; there are {', '.join(METRICS)}")
        if metric != "is" and reference is None:
            raise ValueError(f"{metric} compares with a reference: give one")
        if metric in OF_PICTURES and not pictures:
            raise ValueError(f"{metric} needs the reference's pictures, and {reference} holds moments alone")


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
    """Each metric of `METRICS` that is asked for. reference: not needed for `is` alone.

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


def _values(metric: str, samples: Features, reference: Reference | None, sets: list[np.ndarray]) -> list[float]:
    """The metric of each of these sets of the samples' rows."""
    if metric == "is":
        logits_NK = samples.logits_NK
        return [inception_score(logits_NK[rows], max(1, len(rows) // SPLIT))[0] for rows in sets]
    assert reference is not None
    if metric == "kid":
        counts_RN = np.stack([np.bincount(rows, minlength=len(samples)) for rows in sets])
        return kernel_distances(samples.pool_ND, _pool(reference), counts_RN)
    moments, features_ND = (
        (reference.pool, samples.pool_ND) if metric == "fid" else (reference.spatial, samples.spatial_ND)
    )
    if moments is None or features_ND is None:
        raise ValueError(f"sfid needs maps of features, which {reference.title} or the network does not have")
    return [frechet_distance(moments, Moments.of(features_ND[rows])) for rows in sets]


def _precision_recall(samples: Features, reference: Reference | None) -> list[tuple[float, int]]:
    """Both shares, each with how many pictures it is a share of."""
    assert reference is not None
    pool_MD = _pool(reference)
    return list(zip(precision_recall(samples.pool_ND, pool_MD), (len(samples), len(pool_MD)), strict=True))


def _pool(reference: Reference) -> np.ndarray:
    assert reference.features is not None
    return reference.features.pool_ND
