"""The first stage of latent diffusion: AutoencoderKL under L1, a perceptual distance, KL and a PatchGAN (arXiv:2112.10752).

As CompVis/latent-diffusion's `contperceptual.py`, with these differences: the generator's and the discriminator's gradients
are both taken at the parameters before the step, from one reconstruction, where the original updates the generator, and
then the discriminator on a new reconstruction; and `logvar` is trained, where the original computes its gradient but gives it
to no optimizer.
"""

import logging
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jdiff import models, sharding, tree
from jdiff.evaluate.reconstruction import likeness, read_lpips, reconstruct
from jdiff.loading import DTYPES
from jdiff.models import lpips
from jdiff.models.discriminator import PatchDiscriminator
from jdiff.pipelines import from_uint8, gather, grid, to_uint8
from jdiff.pipelines.rows import spread
from jdiff.tasks import NOTHING, Batch, GradientFn, Losses, open_source, use_given
from jdiff.tasks import autoencoder_loss as losses
from jdiff.tasks.heldout import heldout_records
from jdiff.tasks.parts import Part, open_base, part_of, refuse_sizes

log = logging.getLogger(__name__)
DUMMY = (1, 32, 32, 3)


def reconstructor(vae: Any, x_BHWC: jax.Array, keys_B: jax.Array) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """The autoencoder's parameters -> (reconstructions, KL divergences (B,)) of pictures in [-1, 1], a latent drawn by each key."""

    def reconstruct(params: Any) -> tuple[jax.Array, jax.Array]:
        posterior = vae.apply({"params": params}, x_BHWC, method="encode")
        y_BHWC = vae.apply({"params": params}, posterior.sample(keys_B), method="decode")
        return y_BHWC.astype(x_BHWC.dtype), posterior.kl().astype(x_BHWC.dtype)

    return reconstruct


def make_nll(
    distance: Any, lpips_weight: float, edge_weight: float
) -> Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Losses]]:
    """(full tree, pictures, reconstructions, logvar) -> (mean negative log-likelihood, it and its parts of each picture).

    distance: an LPIPS module, or None.
    """

    def nll(full: Any, x_BHWC: jax.Array, y_BHWC: jax.Array, logvar: jax.Array) -> tuple[jax.Array, Losses]:
        l1_B, perceptual_B = jnp.abs(x_BHWC - y_BHWC).sum((1, 2, 3)), jnp.zeros(len(x_BHWC), x_BHWC.dtype)
        values = x_BHWC[0].size
        parts = {"l1": l1_B / values}
        if distance is not None:
            parts["lpips"] = distance.apply({"params": full["lpips"]}, x_BHWC, y_BHWC)
            perceptual_B += lpips_weight * parts["lpips"]
        if edge_weight:
            parts["edge"] = losses.edge_distance(x_BHWC, y_BHWC)
            perceptual_B += edge_weight * parts["edge"]
        nll_B = losses.reconstruction_nll(l1_B, perceptual_B, logvar, values)
        return nll_B.mean(), {"nll": nll_B, **parts}

    return nll


def autoencoder_gradient(
    vae: Any,
    disc: Any,
    distance: Any,
    *,
    kl_weight: float,
    lpips_weight: float,
    edge_weight: float,
    gan: Mapping[str, Any],
) -> GradientFn:
    """The gradient of the generator's loss for `vae/…` and `logvar`, and of the discriminator's for `disc/…`.

    distance: an LPIPS module, or None. gan: `start`, the first step with a discriminator, and `weight`.
    """
    nll_of = make_nll(distance, lpips_weight, edge_weight)

    def gradient(params: Any, frozen: Any, batch: Batch, keys_B: jax.Array, step: jax.Array) -> tuple[Any, Losses]:
        full = tree.merge(params, frozen)
        x_BHWC = from_uint8(batch["image"])
        B = len(x_BHWC)
        (y_BHWC, kl_B), pull = jax.vjp(reconstructor(vae, x_BHWC, keys_B), params["vae"])
        nll = jax.value_and_grad(partial(nll_of, full, x_BHWC), argnums=(0, 1), has_aux=True)
        (_, parts), (to_y_BHWC, logvar_gradient) = nll(y_BHWC, params["logvar"])
        # only one leaf of these two is used: the compiler drops the rest of either backward pass
        last = lambda to_y: pull((to_y, jnp.zeros_like(kl_B)))[0]["decoder"]["conv_out"]["kernel"]  # noqa: E731
        logits = lambda disc_params, z_BHWC: disc.apply({"params": disc_params}, z_BHWC)  # noqa: E731

        # always run, as in the original: XLA's CPU convolutions are five times slower inside a conditional
        on = (step >= gan["start"]).astype(x_BHWC.dtype)
        g_loss, gan_BHWC = jax.value_and_grad(lambda y: losses.generator_loss(logits(params["disc"], y)))(y_BHWC)
        weight = on * gan["weight"] * losses.adaptive_weight(last(to_y_BHWC), last(gan_BHWC))
        hinge = lambda p: on * losses.discriminator_loss(logits(p, x_BHWC), logits(p, y_BHWC))  # noqa: E731
        d_loss, d_gradient = jax.value_and_grad(hinge)(params["disc"])

        (vae_gradient,) = pull((to_y_BHWC + weight * gan_BHWC, jnp.full_like(kl_B, kl_weight / B)))
        loss_B = parts["nll"] + kl_weight * kl_B + weight * g_loss
        found = {"loss": loss_B, **parts, "kl": kl_B, "logvar": params["logvar"]}
        found |= {"g_loss": g_loss, "d_loss": d_loss, "d_weight": weight}
        grads = {"vae": vae_gradient, "disc": d_gradient, "logvar": logvar_gradient}
        return {**params, **grads}, {k: jnp.broadcast_to(v, (B,)) for k, v in found.items()}

    return gradient


class Autoencoder:
    """See `jdiff.tasks.Task`."""

    transform = None
    frozen = r"lpips/.*"
    base = NOTHING
    adaptable = ("vae",)

    def __init__(self, config: Any, mesh: Mesh, workdir: Path | None = None):
        self.config, self.mesh = config, mesh
        dtype, size = DTYPES[config.precision], config.data.image_size
        self.part = None if config.init_from is None else _given_vae(config, dtype)
        made = models.create("sd15/vae", **config.vae, dtype=dtype) if self.part is None else self.part.module
        self.vae = made.clone(scaling_factor=1.0)
        self.title = f"autoencoder f{self.vae.downscale}, {self.vae.latent_channels} channels"
        if size % self.vae.downscale or size < 32:
            raise ValueError(
                f"data.image_size={size} must be a multiple of {self.vae.downscale}, which vae.block_out_channels shrinks by, "
                "and 32 at least"
            )
        self.source = open_source(config)
        if self.source.kind != "image":
            raise ValueError(
                f"data.name={config.data.name!r} holds {self.source.kind}s; an autoencoder trains on pictures"
            )
        self.disc = PatchDiscriminator(config.gan.width, dtype)
        self.distance = lpips.LPIPS(dtype) if config.lpips.path else None
        if self.distance is None and config.lpips.weight and not config.loss.edge_weight:
            log.warning("lpips.path is not set: this run has no perceptual loss")
        if config.lora.rank and config.gan.weight and config.gan.start <= config.total_steps:
            raise ValueError(
                f"gan.start={config.gan.start}: adapters are trained without a discriminator; set gan.weight=0"
            )
        weights = {"lpips_weight": config.lpips.weight, "edge_weight": config.loss.edge_weight}
        self.nll = make_nll(self.distance, **weights)
        self.gradient = autoencoder_gradient(
            self.vae, self.disc, self.distance, kl_weight=config.loss.kl_weight, **weights, gan=config.gan
        )

    def loss(self, full: Any, batch: Batch, keys_B: jax.Array) -> Losses:
        """What adapters are trained by: the generator's loss without a discriminator."""
        x_BHWC = from_uint8(batch["image"])
        y_BHWC, kl_B = reconstructor(self.vae, x_BHWC, keys_B)(full["vae"])
        _, parts = self.nll(full, x_BHWC, y_BHWC, full["logvar"])
        return {"loss": parts["nll"] + self.config.loss.kl_weight * kl_B, **parts, "kl": kl_B}

    def given(self) -> Any:
        """The autoencoder of init_from, and LPIPS' weights, where lpips.path is set: a safetensors file, or a folder of them."""
        given = {} if self.part is None else {"vae": self.part.weights()}
        if self.distance is None:
            return given
        try:
            return {**given, "lpips": read_lpips(self.config.lpips.path)}
        except ValueError as error:
            raise ValueError(f"lpips.path={self.config.lpips.path!r}: {error}") from error

    def init(self, key: jax.Array, given: Any) -> Any:
        """Fresh weights of all but what is given; logvar 0."""
        keys, pictures = jax.random.split(key, 2), jnp.zeros(DUMMY)
        full = {
            "vae": self.vae.init(keys[0], *self.vae.dummy_inputs())["params"],
            "disc": self.disc.init(keys[1], pictures)["params"],
            "logvar": jnp.zeros(()),
        }
        if self.distance is not None:
            full["lpips"] = self.distance.init(key, pictures, pictures)["params"]
        return use_given(full, given)

    @cached_property
    def heldout(self) -> np.ndarray:
        """Pictures set apart: uint8 (N, H, W, 3)."""
        return heldout_records(self.config, self.source)["image"]

    @cached_property
    def _measure(self) -> Any:
        def measure(params: Any, image_BHWC: jax.Array) -> dict[str, jax.Array]:
            x_BHWC = from_uint8(image_BHWC)
            posterior, y_BHWC = reconstruct(self.vae, params, x_BHWC)
            mean, var = posterior.mean.astype(jnp.float32), jnp.exp(posterior.logvar.astype(jnp.float32))
            average = lambda z: z.mean((1, 2, 3))  # noqa: E731
            return {
                **likeness(x_BHWC, y_BHWC, ("psnr", "ssim")),
                "mean": average(mean),
                "square": average(mean**2 + var),
                "picture": y_BHWC,
            }

        return jax.jit(measure, out_shardings=sharding.batch_sharding(self.mesh))

    def _reconstructed(self, full: Any, image_BHWC: np.ndarray) -> dict[str, np.ndarray]:
        """What `_measure` finds, row by row, in batches of a training step's size."""
        count, rows = len(image_BHWC), self.config.batch_size // self.config.accumulate
        parts = []
        for start in range(0, count, rows):
            batch = spread(self.mesh, {"image": image_BHWC[np.arange(start, start + rows) % count]})
            parts.append({k: gather(v)[: count - start] for k, v in self._measure(full["vae"], batch["image"]).items()})
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    def measure(self, full: Any) -> dict[str, float]:
        """Of held-out pictures: `psnr` in dB, `ssim`, and `scaling_factor`, 1 over the latents' standard deviation."""
        found = self._reconstructed(full, self.heldout)
        variance = found["square"].mean(dtype=np.float64) - found["mean"].mean(dtype=np.float64) ** 2
        means = {name: float(found[name].mean(dtype=np.float64)) for name in ("psnr", "ssim")}
        return {**means, "scaling_factor": float(variance**-0.5)}

    def grid(self, full: Any) -> tuple[Image.Image, dict[str, Any]]:
        """Rows of held-out pictures, each above the row of their reconstructions."""
        chosen = np.linspace(0, len(self.heldout) - 1, min(self.config.sample.count, len(self.heldout))).astype(int)
        image_NHWC = self.heldout[chosen]
        made_NHWC = to_uint8(self._reconstructed(full, image_NHWC)["picture"])
        columns = min(8, len(image_NHWC))
        rows = [x[i : i + columns] for i in range(0, len(image_NHWC), columns) for x in (image_NHWC, made_NHWC)]
        return grid(np.concatenate(rows), columns=columns), {"heldout": chosen.tolist()}

    def facts(self, measures: Mapping[str, float]) -> dict[str, Any]:
        """See `Task.facts`; also `scaling_factor`, with which the record of the vae is made."""
        factor = measures.get("scaling_factor", 1.0)
        return {
            "main": "vae",
            "models": {"vae": {**models.describe(self.vae), "scaling_factor": factor}},
            "scaling_factor": factor,
            "class_names": list(self.source.class_names),
            "data_fingerprint": self.source.fingerprint,
        }

    def macs(self) -> int:
        """The autoencoder's, there and back; not the discriminator's."""
        return self.vae.macs(self.config.data.image_size)


def _given_vae(config: Any, dtype: Any) -> Part:
    """The autoencoder of init_from. ValueError where the config asks for sizes of its own."""
    refuse_sizes(config, ("vae.",))
    return part_of(open_base(config, dtype), "vae", f"init_from={config.init_from}")
