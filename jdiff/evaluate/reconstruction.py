"""How near a picture is to its original: PSNR and SSIM. Pictures are (B, H, W, C) in [0, 1]; one number each comes out, (B,)."""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def psnr(x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, -10 log10 of the mean squared difference; 100 where that is below 1e-10."""
    return -10.0 * jnp.log10(jnp.maximum(((x_BHWC - y_BHWC) ** 2).mean((1, 2, 3)), 1e-10))


def ssim(x_BHWC: jax.Array, y_BHWC: jax.Array) -> jax.Array:
    """Structural similarity (Wang et al., 2004): Gaussian windows of 11x11 that lie wholly inside, mean over them and C.

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
