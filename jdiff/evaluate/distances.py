"""How far two sets of features lie apart: Fréchet and kernel distances, precision and recall; the Inception score of one; and
how near pictures lie to their texts.

All in float64 on the host: a distance is a small difference of large sums, and takes seconds where the features took hours.
"""

from collections.abc import Iterator

import numpy as np

from jdiff.evaluate.moments import Moments

BLOCK = 1024
"""Rows whose distances to all others are held at once."""


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean - mean|² + tr(A + B - 2 (A B)^½), squared 2-Wasserstein between normal laws (FID's, arXiv:1706.08500).

    The root's trace is that of the symmetric (A^½ B A^½)^½, which needs no complex numbers that one would cut off. A^½ is kept
    with `a`, for comparisons with many.
    ValueError for features of different lengths.
    """
    if a.mean_D.shape != b.mean_D.shape:
        raise ValueError(f"features of {len(a.mean_D)} and of {len(b.mean_D)} numbers cannot be compared")
    product_D = np.linalg.eigvalsh(a.root_DD @ b.covariance_DD @ a.root_DD)
    trace = np.trace(a.covariance_DD) + np.trace(b.covariance_DD) - 2 * np.sqrt(np.maximum(product_D, 0)).sum()
    return float(((a.mean_D - b.mean_D) ** 2).sum() + trace)


def kernel_distance(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """KID (arXiv:1801.01401): the unbiased squared MMD under the kernel (x·y / D + 1)³; may be slightly negative.

    Over all pairs; the customary mean over subsets estimates the same with more noise. ValueError for fewer than two rows.
    """
    return kernel_distances(x_ND, y_MD, np.ones((1, len(x_ND))))[0]


def kernel_distances(x_ND: np.ndarray, y_MD: np.ndarray, counts_RN: np.ndarray) -> list[float]:
    """`kernel_distance` of R sets made of x's rows, where set r has row n counts_RN[r, n] times, by one pass over the pairs."""
    x_ND, y_MD = _pair(x_ND, y_MD)
    counts_RN = np.asarray(counts_RN, np.float64)
    sizes_R, M = counts_RN.sum(1), len(y_MD)
    if min(*sizes_R, M) < 2:
        raise ValueError(f"a kernel distance takes two features or more of each, found {sizes_R.min():.0f} and {M}")
    within_R, across_R = np.zeros(len(counts_RN)), np.zeros(len(counts_RN))
    for start in range(0, len(x_ND), BLOCK):
        x_BD, counts_RB = x_ND[start : start + BLOCK], counts_RN[:, start : start + BLOCK]
        within_R += (counts_RB * (counts_RN @ _kernel(x_ND, x_BD))).sum(1)
        across_R += counts_RB @ _kernel(x_BD, y_MD).sum(1)
    within_R = (within_R - counts_RN @ _kernel_self(x_ND)) / (sizes_R * (sizes_R - 1))
    blocks = (y_MD[start : start + BLOCK] for start in range(0, M, BLOCK))
    within_y = (sum(_kernel(y_BD, y_MD).sum() for y_BD in blocks) - _kernel_self(y_MD).sum()) / (M * (M - 1))
    return (within_R + within_y - 2 * across_R / (sizes_R * M)).tolist()


def _kernel(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    kernel_NM = x_ND @ y_MD.T
    kernel_NM /= x_ND.shape[1]
    kernel_NM += 1
    return np.multiply(kernel_NM * kernel_NM, kernel_NM, out=kernel_NM)


def _kernel_self(x_ND: np.ndarray) -> np.ndarray:
    """Of each row with itself."""
    return (_lengths(x_ND) / x_ND.shape[1] + 1) ** 3


def _lengths(x_ND: np.ndarray) -> np.ndarray:
    """Squared, one a row."""
    return np.einsum("nd,nd->n", x_ND, x_ND)


def inception_score(logits_NK: np.ndarray, splits: int = 1) -> tuple[float, float]:
    """exp(mean KL(p(y|x) | p(y))) (arXiv:1606.03498): (mean, deviation) over `splits` parts of the rows in their order.

    The customary split is of 5,000 rows. ValueError for fewer rows than splits.
    """
    logits_NK = np.asarray(logits_NK, np.float64)
    if not 1 <= splits <= len(logits_NK):
        raise ValueError(f"{len(logits_NK)} rows cannot be split into {splits} parts")
    logs_NK = logits_NK - np.logaddexp.reduce(logits_NK, 1, keepdims=True)
    scores = []
    for part_NK in np.array_split(logs_NK, splits):
        mean_K = np.logaddexp.reduce(part_NK, 0) - np.log(len(part_NK))
        scores.append(np.exp((np.exp(part_NK) * (part_NK - mean_K)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def clip_score(image_ND: np.ndarray, text_ND: np.ndarray) -> np.ndarray:
    """100 max(cosine, 0) of each picture and its text, (N,): CLIPScore (arXiv:2104.08718) with torchmetrics' factor.

    The paper's factor is 2.5, for values about 1.
    """
    image_ND, text_ND = _pair(image_ND, text_ND)
    lengths_N = np.sqrt(_lengths(image_ND) * _lengths(text_ND))
    return 100 * np.maximum(np.einsum("nd,nd->n", image_ND, text_ND) / lengths_N, 0)


def precision_recall(x_ND: np.ndarray, reference_MD: np.ndarray, k: int = 3) -> tuple[float, float]:
    """(share of x within the reference's manifold, share of the reference within x's) (arXiv:1904.06991).

    A manifold is the union of balls about a set's features, each as large as the distance to its k-th nearest neighbour.
    ValueError for sets of k rows or fewer.
    """
    x_ND, reference_MD = _pair(x_ND, reference_MD)
    if min(len(x_ND), len(reference_MD)) <= k:
        raise ValueError(f"{k} neighbours take more features than {k} of each, found {len(x_ND)}, {len(reference_MD)}")
    radii_N, radii_M = (_radii(z, k) for z in (x_ND, reference_MD))
    inside, reached_M = 0, np.zeros(len(reference_MD), bool)
    for start, squared_BM in _squared(x_ND, reference_MD):
        inside += int((squared_BM <= radii_M).any(1).sum())
        reached_M |= (squared_BM <= radii_N[start : start + len(squared_BM), None]).any(0)
    return inside / len(x_ND), float(reached_M.mean())


def _pair(x_ND: np.ndarray, y_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x_ND, y_MD = np.asarray(x_ND, np.float64), np.asarray(y_MD, np.float64)
    if x_ND.shape[1] != y_MD.shape[1]:
        raise ValueError(f"features of {x_ND.shape[1]} and of {y_MD.shape[1]} numbers cannot be compared")
    return x_ND, y_MD


def _squared(x_ND: np.ndarray, y_MD: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Squared distances (B, M) of some of x's rows to all of y's, with the first row's number."""
    lengths_M = _lengths(y_MD)
    for start in range(0, len(x_ND), BLOCK):
        x_BD = x_ND[start : start + BLOCK]
        squared_BM = x_BD @ y_MD.T
        squared_BM *= -2
        squared_BM += _lengths(x_BD)[:, None]
        squared_BM += lengths_M
        yield start, np.maximum(squared_BM, 0, out=squared_BM)


def _radii(x_ND: np.ndarray, k: int) -> np.ndarray:
    """Squared distances to the k-th neighbour, of which a row itself is none."""
    found = []
    for start, squared_BN in _squared(x_ND, x_ND):
        rows = np.arange(len(squared_BN))
        squared_BN[rows, start + rows] = np.inf
        squared_BN.partition(k - 1, axis=1)
        found.append(squared_BN[:, k - 1].copy())  # a view would keep the block
    return np.concatenate(found)
