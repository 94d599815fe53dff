"""How far a quantized model is from its original: its output by noise level, and pictures from the same noise.

Pictures of the original's own, noised again, are what both are asked about, so no data set is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.evaluate.calibration import BINS, noised, predict
from jdiff.evaluate.reconstruction import psnr
from jdiff.pipelines import ClassPipeline, gather


@dataclass(frozen=True)
class Distance:
    """error: relative squared error of the model's output, ||y - y_0||^2 / ||y_0||^2, in each of `BINS` bins of the noise level,
    from little noise to much; None where no model is compared. psnr: of pictures (uint8) from the same noise, in dB, their mean.
    """

    error: list[float] | None
    psnr: float


def compare(
    pipe: ClassPipeline,
    others: Mapping[str, ClassPipeline],
    labels: Sequence[int],
    *,
    seed: int = 0,
    draws: int = 2,
    **settings: Any,
) -> dict[str, Distance]:
    """Each of `others` against `pipe`, and "another seed", pictures of `pipe` that have nothing but their labels in common.

    draws: noise levels and noises a picture and bin. settings: of the pipelines' calls.
    """
    x_0 = pipe(labels, seed=seed, **settings)
    pictures = pipe.pictures(x_0)
    exact = _outputs(pipe, x_0, labels, seed, draws)
    found = {}
    for name, other in others.items():
        outputs = _outputs(other, x_0, labels, seed, draws)
        error = [float(np.square(y - y_0).sum() / np.square(y_0).sum()) for y, y_0 in zip(outputs, exact, strict=True)]
        found[name] = Distance(error, _psnr(other.pictures(other(labels, seed=seed, **settings)), pictures))
    found["another seed"] = Distance(None, _psnr(pipe.pictures(pipe(labels, seed=seed + 1, **settings)), pictures))
    return found


def _outputs(
    pipe: ClassPipeline, x_0_BHWC: np.ndarray, labels: Sequence[int], seed: int, draws: int
) -> list[np.ndarray]:
    """The model's output in each bin, float64 (draws * B, H, W, C)."""
    run = jax.jit(partial(predict, pipe.model))
    found: list[list[np.ndarray]] = [[] for _ in range(BINS)]
    for b, batch in noised(pipe, x_0_BHWC, labels, seed, draws):
        found[b].append(gather(run(pipe.params, batch))[: len(labels)].astype(np.float64))
    return [np.concatenate(made) for made in found]


def _psnr(made_BHWC: np.ndarray, exact_BHWC: np.ndarray) -> float:
    one, other = (jnp.asarray(x, jnp.float32) / 255.0 for x in (made_BHWC, exact_BHWC))
    return float(psnr(one, other).mean())


def table(found: Mapping[str, Distance]) -> str:
    """The distances as text, a column each."""
    width = max(12, *(len(name) + 2 for name in found))
    rows = ["noise level" + "".join(f"{name:>{width}}" for name in found)]
    for b in range(BINS):
        cells = ("" if one.error is None else f"{one.error[b]:.2e}" for one in found.values())
        rows.append(f"{b / BINS:.1f} - {(b + 1) / BINS:.1f}  " + "".join(f"{cell:>{width}}" for cell in cells))
    rows.append("PSNR, dB   " + "".join(f"{one.psnr:>{width}.1f}" for one in found.values()))
    return "\n".join(rows)
