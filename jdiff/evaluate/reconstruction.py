"""How near pictures are to their originals, one by one: PSNR, SSIM, LPIPS; and what an autoencoder makes of them."""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import convert, sharding
from jdiff.evaluate.features import ROWS, by_rows
from jdiff.evaluate.scores import Score
from jdiff.models import lpips
from jdiff.pipelines import from_uint8, to_uint8

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def psnr(x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], (B,): -10 log10 of the mean squared difference; 100 where that is
    below 1e-10."""
    return -10.0 * jnp.log10(jnp.maximum(((x_BHWC - y_BHWC) ** 2).mean((1, 2, 3)), 1e-10))


def ssim(x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
    """Structural similarity (Wang et al., 2004) of pictures in [0, 1], (B,): Gaussian windows of 11x11 that lie wholly inside,
    mean over them and C.

    ValueError for pictures smaller than the window.
    """
    if min(x_BHWC.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of {WINDOW}x{WINDOW} pixels or more, found {x_BHWC.shape[1:3]}")
    tap = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    tap = (tap / tap.sum()).astype(x_BHWC.dtype)

    def blur(z_BHWC: jax.Array) -> jax.Array:
        for axis in (1, 2):
            size = z_BHWC.shape[axis] - WINDOW + 1
            shifted = [tap[i] * jax.lax.slice_in_dim(z_BHWC, i, i + size, axis=axis) for i in range(WINDOW)]
            z_BHWC = reduce(jnp.add, shifted)
        return z_BHWC

    x, y = blur(x_BHWC), blur(y_BHWC)
    var_x, var_y = blur(x_BHWC**2) - x**2, blur(y_BHWC**2) - y**2
    covariance = blur(x_BHWC * y_BHWC) - x * y
    c1, c2 = K1**2, K2**2
    score = (2 * x * y + c1) * (2 * covariance + c2) / ((x**2 + y**2 + c1) * (var_x + var_y + c2))
    return score.mean((1, 2, 3))


def likeness(
    x_BHWC: jax.Array, y_BHWC: jax.Array, metrics: Sequence[str], lpips_params: Any = None
) -> dict[str, jax.Array]:
    """Metrics of `PAIRED`, (B,) each, of originals and pictures in [-1, 1]. lpips_params: see `read_lpips`."""
    pair = ((x_BHWC + 1) / 2, (y_BHWC + 1) / 2)
    found: dict[str, Any] = {}
    for metric in metrics:
        if metric == "lpips":
            found[metric] = lpips.LPIPS().apply({"params": lpips_params}, x_BHWC, y_BHWC)
        else:
            found[metric] = (psnr if metric == "psnr" else ssim)(*pair)
    return found


def reconstruct(vae: Any, params: Any, x_BHWC: jax.Array) -> tuple[Any, jax.Array]:
    """(an autoencoder's posterior of pictures in [-1, 1], what its mode is decoded to: fp32, within [-1, 1])."""
    posterior = vae.apply({"params": params}, x_BHWC, method="encode")
    y_BHWC = vae.apply({"params": params}, posterior.mode(), method="decode").astype(jnp.float32)
    return posterior, jnp.clip(y_BHWC, -1, 1)


def read_lpips(path: str | Path) -> Any:
    """LPIPS' parameters from a safetensors file, or a folder of them; see `models.lpips.from_torch`. ValueError as there."""
    path = Path(path)
    return lpips.from_torch(convert.read_arrays(sorted(path.glob("*.safetensors")) if path.is_dir() else [path]))


def reconstructions(vae: Any, params: Any, batches: Iterable[np.ndarray], at_once: int = ROWS) -> Iterator[np.ndarray]:
    """What an autoencoder makes of pictures, uint8 (B, H, W, 3) each. at_once: pictures that a device has in work."""

    def made(params: Any, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"made": reconstruct(vae, params, from_uint8(rows["image"]))[1]}

    rows = ({"image": batch} for batch in batches)
    yield from (to_uint8(part["made"]) for part in by_rows(made, params, rows, sharding.make_mesh(), at_once))


def pair_scores(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], metrics: Sequence[str], lpips_params: Any = None
) -> tuple[dict[str, Score], int]:
    """(metrics of `PAIRED` as means over all pictures, with an interval of 1.96 standard errors; how many pictures).

    pairs: batches of originals and of pictures, uint8 (B, H, W, 3) each.
    """

    def compare(params: Any, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return likeness(from_uint8(rows["image"]), from_uint8(rows["made"]), metrics, params)

    rows = ({"image": image, "made": made} for image, made in pairs)
    parts = list(by_rows(compare, lpips_params or {}, rows, sharding.make_mesh()))
    if not parts:
        raise ValueError("there are no pictures to score")
    values = {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in metrics}
    return {name: _mean(values_N) for name, values_N in values.items()}, len(values[metrics[0]])


def _mean(values_N: np.ndarray) -> Score:
    mean = float(values_N.mean())
    error = float(values_N.std(ddof=1) / len(values_N) ** 0.5) if len(values_N) > 1 else float("nan")
    return Score(mean, mean - 1.96 * error, mean + 1.96 * error)
