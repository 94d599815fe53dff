"""Distances between sets of features equal plain float64 computations of their definitions, however the sets are cut up."""

import subprocess
import sys
from functools import reduce

import numpy as np
import pytest
import scipy.linalg

from jdiff.evaluate.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distances,
    precision_recall,
)
from jdiff.evaluate.moments import Moments


def features(rows, seed, width=24, shift=0.0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(1).normal(size=(width, width)) / width**0.5
    return (rng.normal(size=(rows, width)) @ mix * (1 + 0.2 * seed) + shift + 3.0).astype(np.float32)


X, Y = features(300, 0), features(230, 1, shift=0.1)


def in_batches(z, size):
    return reduce(Moments.__add__, (Moments.of(z[i : i + size]) for i in range(0, len(z), size)))


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_moments_are_numpys_in_any_split(size):
    found = in_batches(X, size)
    assert found.count == len(X)
    np.testing.assert_allclose(found.mean_D, X.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance_DD, np.cov(X.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-14)
    again = Moments.from_statistics(found.count, found.mean_D, found.covariance_DD)
    np.testing.assert_allclose(again.scatter_DD, found.scatter_DD, rtol=1e-12)


def test_moments_do_not_lose_a_small_spread_about_a_large_mean():
    far = np.float64(X) * 1e-3 + 1e4
    np.testing.assert_allclose(in_batches(far, 32).covariance_DD, np.cov(far, rowvar=False), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("rows", [300, 12])  # 12: fewer than the features are long, so their covariance is singular
def test_frechet_distance_equals_scipys(rows):
    x, y = np.float64(X[:rows]), np.float64(Y[:rows])
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    # of a singular product scipy's root has half the digits
    tolerance = 1e-6 if rows > 24 else 1e-4
    assert frechet_distance(in_batches(x, 50), in_batches(y, 50)) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_normal_laws_in_closed_form():
    """Diagonal covariances: the sum of (difference of deviations)²."""
    a, b, mean = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.0]), np.array([0.0, 1.0, 2.0])
    x, y = (Moments.from_statistics(10, m, np.diag(v)) for m, v in ((0 * mean, a), (mean, b)))
    assert frechet_distance(x, y) == pytest.approx(5.0 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_kernel_distance_equals_its_definition():
    x, y = np.float64(X[:40]), np.float64(Y[:30])
    kernel = lambda u, v: (float(u @ v) / 24 + 1) ** 3  # noqa: E731
    mean = lambda pairs: np.mean([kernel(u, v) for u, v in pairs])  # noqa: E731
    xx = mean([(x[i], x[j]) for i in range(40) for j in range(40) if i != j])
    yy = mean([(y[i], y[j]) for i in range(30) for j in range(30) if i != j])
    xy = mean([(u, v) for u in x for v in y])
    assert kernel_distance(X[:40], Y[:30]) == pytest.approx(xx + yy - 2 * xy, rel=1e-6)


def test_kernel_distances_of_resampled_rows_are_those_of_the_rows():
    sets = np.random.default_rng(1).integers(40, size=(3, 40))
    counts = np.stack([np.bincount(rows, minlength=40) for rows in sets])
    expected = [kernel_distance(X[rows], Y[:30]) for rows in sets]
    np.testing.assert_allclose(kernel_distances(X[:40], Y[:30], counts), expected, rtol=1e-9)


def test_inception_score_equals_its_definition():
    logits = np.float64(X[:100, :10]) * 4
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = [np.exp(np.mean([(q * np.log(q / half.mean(0))).sum() for q in half])) for half in (p[:50], p[50:])]
    assert inception_score(logits, 2) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-6)
    assert inception_score(np.zeros((5, 7))) == pytest.approx((1.0, 0.0))
    assert inception_score(1e3 * np.eye(7))[0] == pytest.approx(7.0)


def test_precision_and_recall_equal_their_definition():
    x, y = np.float64(X[:60]), np.float64(Y[:50])
    distance = lambda u, v: np.linalg.norm(u - v)  # noqa: E731
    radius = lambda z, i: sorted(distance(z[i], v) for v in z)[3]  # noqa: E731  (the first is itself)
    inside = lambda u, z: any(distance(u, v) <= radius(z, i) for i, v in enumerate(z))  # noqa: E731
    expected = np.mean([inside(u, y) for u in x]), np.mean([inside(v, x) for v in y])
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert precision_recall(x, y) == pytest.approx(expected, rel=1e-6)
    assert precision_recall(x, x) == (1.0, 1.0)


def test_blocks_change_nothing(monkeypatch):
    whole = precision_recall(X, Y), kernel_distance(X, Y)
    monkeypatch.setattr("jdiff.evaluate.distances.BLOCK", 17)
    assert precision_recall(X, Y) == whole[0]
    assert kernel_distance(X, Y) == pytest.approx(whole[1], rel=1e-9)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: frechet_distance(Moments.of(X), Moments.of(X[:, 1:])), "features of 24 and of 23 numbers"),
        (lambda: Moments.of(X) + Moments.of(X[:, 1:]), "features of 24 and of 23 numbers"),
        (lambda: frechet_distance(Moments.of(X[:1]), Moments.of(X)), "two features or more, found 1"),
        (lambda: kernel_distance(X[:1], X), "two features or more of each, found 1 and 300"),
        (lambda: precision_recall(X, Y[:3]), "more features than 3 of each, found 300, 3"),
        (lambda: inception_score(X, 301), "300 rows cannot be split into 301"),
    ],
)
def test_a_mistake_is_one_line(call, said):
    with pytest.raises(ValueError, match=said):
        call()


TEN_THOUSAND = """
import resource, numpy as np
from jdiff.evaluate.features import Features
from jdiff.evaluate.scores import METRICS, Reference, scores

rng = np.random.default_rng(0)
draw = lambda: Features(*(rng.standard_normal((10_000, n), np.float32) for n in (2048, 1008, 2023)))
found = scores(draw(), Reference.of("others", draw()), METRICS, resamples=2)
assert all(np.isfinite((s.value, s.low, s.high)).all() for s in found.values()), found
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
"""


@pytest.mark.slow
def test_scores_of_ten_thousand_take_less_than_two_gigabytes():
    """Of Inception's features, all metrics, the samples' and the reference's in memory."""
    done = subprocess.run([sys.executable, "-c", TEN_THOUSAND], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2048
