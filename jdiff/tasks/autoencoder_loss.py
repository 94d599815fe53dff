"""The autoencoder's losses, as CompVis/latent-diffusion's `contperceptual.py` has them: pure functions of pictures and logits."""

import jax
import jax.numpy as jnp

MOST_WEIGHT = 1e4


def reconstruction_nll(l1_B: jax.Array, perceptual_B: jax.Array, logvar: jax.Array, values: int) -> jax.Array:
    """(|x - y| + perceptual) / exp(logvar) + logvar, summed over a picture's `values`: (B,).

    l1_B: the summed |x - y|; perceptual_B: the distance, already weighted, which each of the values carries.
    """
    return (l1_B + values * perceptual_B) / jnp.exp(logvar) + values * logvar


def generator_loss(fake: jax.Array) -> jax.Array:
    """Minus the mean logit of reconstructions."""
    return -fake.mean()


def discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The hinge loss on logits of originals and reconstructions."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def adaptive_weight(nll_gradient: jax.Array, generator_gradient: jax.Array) -> jax.Array:
    """||gradient of nll|| / (||gradient of the generator's loss|| + 1e-4), at most 1e4, both at the decoder's last kernel."""
    norm = lambda x: jnp.sqrt(jnp.sum(x * x))  # noqa: E731
    return jnp.clip(norm(nll_gradient) / (norm(generator_gradient) + 1e-4), 0.0, MOST_WEIGHT)


def edge_distance(x_BHWC: jax.Array, y_BHWC: jax.Array, scales: int = 3) -> jax.Array:
    """Mean |difference| of the pictures' horizontal and vertical steps, averaged over `scales` halvings: (B,).

    Our own stand-in for a perceptual distance where no network's weights are at hand: it asks for sharp edges.
    """
    z_BHWC, total_B = x_BHWC - y_BHWC, jnp.zeros(len(x_BHWC), x_BHWC.dtype)
    for scale in range(scales):
        if scale:
            B, H, W, C = z_BHWC.shape
            z_BHWC = z_BHWC[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))
        total_B += jnp.abs(jnp.diff(z_BHWC, axis=1)).mean((1, 2, 3)) + jnp.abs(jnp.diff(z_BHWC, axis=2)).mean((1, 2, 3))
    return total_B / scales
