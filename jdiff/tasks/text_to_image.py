"""Captions to pictures: Stable Diffusion's UNet, with its text encoder or without, in the latents of a fixed autoencoder.

Shapes: B batch, H W height and width, h w the latents', C latent channels, S the tokenizer's length, n chunks, E text width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jdiff import data, models, tokens
from jdiff.data import buckets
from jdiff.data.captions import Captions
from jdiff.data.latents import read_meta
from jdiff.data.prior import WithPrior
from jdiff.data.prompts import Prompts
from jdiff.diffusion.process import Process, make_text_process, make_text_scheduler, scheduler_record
from jdiff.loading import DTYPES, Opened
from jdiff.pipelines import TextPipeline, grid
from jdiff.tasks import NOTHING, Losses, LossFn, mean_gradient, use_given
from jdiff.tasks.parts import Part, find_tokenizer, open_base, open_vae, part_of, refuse_sizes


def text_loss(
    unet: Any, text: Any, vae: Any, process: Process, null: Any, caption_dropout: float = 0.0, clip_skip: int = 0
) -> LossFn:
    """The loss on batches of `image` (uint8) or `latent`, and `tokens` (B, n * S) or `context` (B, S, E), the encoder's output.

    null: what stands in for a dropped caption, the empty one's tokens (S,) or context (S, E). caption_dropout: how often.
    The tree is {"unet", "text", "vae"}; a picture's latent is drawn from its posterior.
    """
    null, name = jnp.asarray(null), "tokens" if null.ndim == 1 else "context"

    def loss(params: Any, batch: Mapping[str, jax.Array], keys_B: jax.Array) -> Losses:
        keys_B3 = jax.vmap(lambda key: jax.random.split(key, 3))(keys_B)
        words, S = batch[name], null.shape[0]
        drop_B = jax.vmap(jax.random.uniform)(keys_B3[:, 0]) < caption_dropout
        empty = jnp.concatenate([null] * (words.shape[1] // S))
        words = jnp.where(drop_B.reshape(-1, *(1,) * empty.ndim), empty, words)
        if name == "tokens":
            encode = lambda ids: text.apply({"params": params["text"]}, ids, clip_skip=clip_skip)  # noqa: E731
            words = tokens.encode_chunks(encode, words, S)
        x_0 = batch["latent"] if "latent" in batch else _latents(vae, params["vae"], batch["image"], keys_B3[:, 1])
        model_fn = lambda x_BhwC, t_B: unet.apply({"params": params["unet"]}, x_BhwC, t_B, words)  # noqa: E731
        losses = process.losses(model_fn, x_0, keys_B3[:, 2])
        return {**losses, "loss": losses["loss"] * batch["weight"]} if "weight" in batch else losses

    return loss


def _latents(vae: Any, params: Any, image_BHWC: jax.Array, keys_B: jax.Array) -> jax.Array:
    """A draw from each picture's posterior, as the UNet has it: (B, h, w, C) in at least float32."""
    dtype = jnp.promote_types(vae.dtype, jnp.float32)
    posterior = vae.apply({"params": params}, image_BHWC.astype(dtype) / 127.5 - 1.0, method="encode")
    return posterior.astype(dtype).sample(keys_B) * vae.scaling_factor


class TextToImage:
    """See `jdiff.tasks.Task`. The autoencoder is never trained, the text encoder where `text.train` says so.

    workdir: where the run's tokenizer is kept; None keeps it nowhere.
    """

    title = "Stable Diffusion"
    base = NOTHING

    def __init__(self, config: Any, mesh: Mesh, workdir: Path | None = None):
        self.config, dtype = config, DTYPES[config.precision]
        _check_base(config)
        # what can be said without the data comes before a long listing
        base = None if config.init_from is None else open_base(config, dtype)
        self.scheduler = make_text_scheduler(config.diffusion, config.sample.scheduler, base and base.scheduler)
        self.scheduler.plan(config.sample.steps)
        if not config.sample.prompts:
            raise ValueError("sample.prompts is empty: give one text at least")
        process = make_text_process(config.diffusion, self.scheduler)
        vae = open_vae(config.vae.path, base, config.init_from, dtype)
        self.source = self._open_source(vae.module.downscale)
        self.null_context = getattr(self.source, "null_context", None)
        if self.null_context is not None:
            _check_contexts(config)
        self.tokenizer = find_tokenizer(config, base, self.source, workdir)
        unet, text = self._untrained(vae.module, dtype) if base is None else _of_base(base, config)
        self.parts = {"unet": unet, "text": text, "vae": vae}
        self.unet, self.text, self.vae = (self.parts[name].module for name in ("unet", "text", "vae"))
        self._check_shapes()
        self.main, self.frozen = ("unet", self.unet), "vae/.*" if config.text.train else "(vae|text)/.*"
        self.transform, null = None, self.null_context
        if null is None:
            c, null = config.captions, self.tokenizer.null
            self.transform = Prompts(self.tokenizer, c.shuffle_tags, c.keep_tags, c.on_long)
        settings = (process, null, config.diffusion.caption_dropout, config.text.clip_skip)
        self.loss = text_loss(self.unet, self.text, self.vae, *settings)
        self.gradient = mean_gradient(self.loss)
        self.adaptable = ("unet", "text") if config.text.train else ("unet",)
        nothing = {name: {} for name in self.parts}  # each grid brings its parameters
        height, width = (side * self.vae.downscale for side in self.latent)
        what = (self.unet, self.vae, self.text, self.tokenizer, self.scheduler, nothing)
        self.pipe = TextPipeline(*what, mesh=mesh, size=(height, width))

    def _open_source(self, downscale: int) -> data.Source:
        """The data set, with captions and of sides that the autoencoder takes."""
        d, b, sizes = self.config.data, self.config.buckets, None
        if d.name != "latents" and d.image_size % downscale:
            raise ValueError(
                f"data.image_size={d.image_size} is no multiple of {downscale}, by which the autoencoder shrinks pictures"
            )
        if b.use:
            if b.step % downscale:
                raise ValueError(f"buckets.step={b.step} is no multiple of {downscale}, the autoencoder's factor")
            sizes = buckets.make_sizes(d.image_size, b.step, b.max_ratio)
        prompt, prior = self.config.captions.prompt, self.config.prior
        settings = {"path": d.path, "image_size": d.image_size, "split": d.split, "buckets": sizes, "prompt": prompt}
        source = data.open_source(d.name, **settings, only=d.only)
        if prior.path is not None:
            if not isinstance(source, Captions) or b.use:
                raise ValueError(
                    f"prior.path={prior.path} goes with data.name='captions' and buckets.use=false, not {d.name!r} and {b.use}"
                )
            source = WithPrior(source, Captions(prior.path, d.image_size, prompt=prior.prompt), prior.weight)
        if not source.has_captions:
            raise ValueError(
                f"data.name={d.name!r} has no captions, which training on text needs: use captions, openmoji, a TFDS data set "
                "with captions, or a cache of latents made from one of them"
            )
        return source

    def _untrained(self, vae: Any, dtype: Any) -> tuple[Part, Part]:
        """The UNet and the text encoder that the config describes."""
        fields = {
            k: v for k, v in self.config.text.items() if k not in ("train", "clip_skip", "vocab_size", "tokenizer")
        }
        text = models.create("sd15/text", vocab_size=self.tokenizer.vocab_size, dtype=dtype, **fields)
        C, E = vae.latent_channels, text.width
        shape = {"in_channels": C, "out_channels": C, "cross_attention_dim": E}
        return Part(models.create("sd15/unet", dtype=dtype, **shape, **self.config.unet)), Part(text)

    def _check_shapes(self) -> None:
        """The models, and latents that come from a cache, belong together."""
        C, skipped = self.vae.latent_channels, self.config.text.clip_skip
        if skipped >= self.text.layers:
            raise ValueError(f"text.clip_skip={skipped} must be below the text encoder's {self.text.layers} layers")
        if self.unet.in_channels != C:
            raise ValueError(
                f"init_from={self.config.init_from}: the UNet takes {self.unet.in_channels} channels and the autoencoder's "
                f"latents have {C}; training one that repaints is not supported"
            )
        if self.source.kind == "latent" and self.source.shape[-1] != C:
            raise ValueError(
                f"data.path={self.config.data.path} holds latents of {self.source.shape[-1]} channels, and the autoencoder's "
                f"have {C}: make the cache with this autoencoder (tools/cache_latents.py --vae)"
            )

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of a record's latent; with buckets, of the square one."""
        H, W, _ = self.source.shape
        return (H, W) if self.source.kind == "latent" else (H // self.vae.downscale, W // self.vae.downscale)

    def given(self) -> Any:
        """The base's weights, and the autoencoder's. ValueError when a cache was made with others."""
        if self.source.kind == "latent":
            meta, path = read_meta(self.config.data.path), self.config.data.path
            if meta["vae"] != self.parts["vae"].digest():
                raise ValueError(f"data.path={path} was made with another autoencoder than vae.path's: make it anew")
            if self.null_context is not None:
                digest = f"{self.parts['text'].digest()}-{self.tokenizer.fingerprint}"
                if meta["context"]["text"] != digest:
                    raise ValueError(
                        f"data.path={path} was made with another text encoder than init_from's: make it anew"
                    )
        return {name: part.weights() for name, part in self.parts.items()}

    def init(self, key: jax.Array, given: Any) -> Any:
        """The models' own initialisations, but for what is given."""
        keys = dict(zip(self.parts, jax.random.split(key, len(self.parts)), strict=True))
        modules = {name: part.module for name, part in self.parts.items()}
        full = {name: m.init(keys[name], *m.dummy_inputs())["params"] for name, m in modules.items()}
        return use_given(full, given)

    def measure(self, full: Any) -> dict[str, float]:
        """Nothing."""
        return {}

    def grid(self, full: Any) -> tuple[Image.Image, dict[str, Any]]:
        """A picture for each of `sample.prompts`."""
        s, seed = self.config.sample, self.config.seed
        settings = {"steps": s.steps, "guidance_scale": s.guidance, "clip_skip": self.config.text.clip_skip}
        pictures = self.pipe(list(s.prompts), **settings, seed=seed, params=full)
        return grid(np.stack([np.asarray(picture) for picture in pictures])), {
            **s.to_dict(),
            "prompts": list(s.prompts),
            "seed": seed,
        }

    def facts(self, measures: Mapping[str, float]) -> dict[str, Any]:
        """See `Task.facts`; also what a pipeline of the run needs: `scheduler`, a scheduler_config.json of diffusers;
        `tokenizer`, the fingerprint of WORKDIR/tokenizer; `clip_skip`; `size`, height and width in pixels."""
        return {
            "main": "unet",
            "models": {name: models.describe(part.module) for name, part in self.parts.items()},
            "class_names": list(self.source.class_names),
            "data_fingerprint": self.source.fingerprint,
            "scheduler": scheduler_record(self.scheduler),
            "tokenizer": self.tokenizer.fingerprint,
            "clip_skip": self.config.text.clip_skip,
            "size": list(self.pipe.geometry.default_size),
        }

    def macs(self) -> int:
        """The UNet's on a record's latent, and the text encoder's where it is trained."""
        unet = self.unet.macs(*self.latent, text_length=self.tokenizer.max_length)
        return unet + (self.text.macs() if self.config.text.train else 0)


def _of_base(base: Opened, config: Any) -> tuple[Part, Part]:
    """The base's UNet and text encoder."""
    unet, text = (part_of(base, name, f"init_from={config.init_from}") for name in ("unet", "text"))
    return Part(unet.module.clone(remat=config.unet.remat), unet.read), text


def _check_base(config: Any) -> None:
    """What cannot go together with a base, or without one."""
    if config.init_from is None:
        if not config.text.train:
            raise ValueError(
                "text.train=false without init_from would keep an untrained text encoder: set text.train=true, or init_from"
            )
        if config.text.tokenizer is not None:
            raise ValueError(
                f"text.tokenizer={config.text.tokenizer} without init_from: words are learnt from the captions"
            )
        return
    if config.lora.rank and config.vae.path is not None:
        raise ValueError(
            f"vae.path={config.vae.path} does not go with lora.rank: adapters keep to init_from's autoencoder"
        )
    refuse_sizes(config, ("unet.", "text."), ("unet.remat", "text.train", "text.clip_skip", "text.tokenizer"))


def _check_contexts(config: Any) -> None:
    """A cache with text embeddings holds the output of one encoder for one order of words."""
    path, shuffle = config.data.path, config.captions.shuffle_tags
    reasons = {
        "text.train=true": config.text.train,
        f"text.clip_skip={config.text.clip_skip}": config.text.clip_skip != 0,
        f"captions.shuffle_tags={shuffle}": shuffle,
        "init_from=None": config.init_from is None,
    }
    for setting, wrong in reasons.items():
        if wrong:
            raise ValueError(
                f"{setting} does not go with data.path={path}, which holds a fixed text encoder's output: make a cache without "
                "--text, or change that"
            )
