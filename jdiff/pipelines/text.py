"""From texts, and pictures to begin with, to pictures: Stable Diffusion's pipelines in one.

Parity: StableDiffusionPipeline, StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline of huggingface/diffusers.
Shapes: B pictures, H W their size, h w the latents', C latent channels, S text length, E text width, M model calls.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jdiff import diffusion, sharding, tokens, tree
from jdiff.diffusion import Plan, Scheduler, schedulers
from jdiff.models.vae import decode_tiled
from jdiff.pipelines.loras import WithLoras
from jdiff.pipelines.pictures import to_uint8
from jdiff.pipelines.progress import Callback, Preview, Report
from jdiff.pipelines.request import Geometry, Pictures, Request, make_request
from jdiff.pipelines.rows import gather, in_slices, on_fewest, over, pinned, place, spread
from jdiff.version import __version__

TILED_ABOVE = 96
"""Latents with a longer side than this are decoded in tiles."""
PIXELS_AT_ONCE = 2**19
"""How many pixels a device decodes or encodes at once; more go one after another. 512 x 512 takes about a GiB."""

Carry = tuple[jax.Array, ...]
Output = Literal["pil", "np", "latent"]


class TextPipeline(WithLoras):
    """Stable Diffusion: a UNet, an autoencoder, a text encoder with its tokenizer, and a scheduler, over a mesh's devices.

    params: {"unet", "vae", "text"}: trees of arrays. Those that lie on the mesh's devices stay as they lie, others are put
    on every device. size: what is made when nothing is said, in pixels, one number or (height, width). clip_skip: the
    one that the UNet was trained with.

    The models run in the dtypes that they were built with. An autoencoder of bfloat16 is quicker; Stable Diffusion v1's is
    safe in it, and a picture that is not finite is an error in any case.

    ValueError when the parts do not fit together.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text: Any,
        tokenizer: tokens.Tokenizer,
        scheduler: Scheduler,
        params: Mapping[str, Any],
        *,
        mesh: Mesh | None = None,
        size: int | tuple[int, int] = 512,
        clip_skip: int = 0,
        loras: Sequence[tuple[str, float]] = (),
    ):
        self.loras = list(loras)
        self.unet, self.vae, self.text = unet, vae, text
        self.tokenizer, self.scheduler, self.clip_skip = tokenizer, scheduler, clip_skip
        self.mesh = mesh or sharding.make_mesh()
        self.params = place(self.mesh, {name: params[name] for name in ("unet", "vae", "text")})
        channels = vae.latent_channels
        # a repainting UNet is shown the latent, a mask of one channel and the masked picture's latent
        if unet.in_channels not in (channels, 2 * channels + 1):
            raise ValueError(
                f"the UNet takes {unet.in_channels} channels, but the autoencoder's latents have {channels}: "
                f"it must take {channels}, or {2 * channels + 1} to repaint"
            )
        if unet.out_channels != channels:
            raise ValueError(f"the UNet gives {unet.out_channels} channels, but the latents have {channels}")
        if unet.cross_attention_dim != text.width:
            raise ValueError(
                f"the UNet reads texts of width {unet.cross_attention_dim}, the encoder's are {text.width}"
            )
        if tokenizer.vocab_size > text.vocab_size or tokenizer.max_length > text.max_length:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids and texts of {tokenizer.max_length}, the text encoder "
                f"{text.vocab_size} and {text.max_length}: they are not of one model"
            )
        height, width = (size, size) if isinstance(size, int) else size
        self.geometry = Geometry(channels, vae.downscale, (height, width), repaints=unet.in_channels != channels)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        image: Pictures | None = None,
        mask: Pictures | None = None,
        strength: float | None = None,
        steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        seed: int | Sequence[int] = 0,
        first_index: int = 0,
        latents: np.ndarray | None = None,
        scheduler: str | Scheduler | None = None,
        height: int | None = None,
        width: int | None = None,
        clip_skip: int | None = None,
        output: Output = "pil",
        callback: Callback | None = None,
        callback_every: int = 1,
        noise: Mapping[str, np.ndarray] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Any:
        """One picture a prompt, from nothing, from an image, or within a mask.

        A picture depends on its seed and index, its prompts and image alone, whatever batch or devices it is made with.

        Args:
          prompt: a text or a list of them, of any length, with weights as `tokens.parse_weights` reads them.
          negative_prompt: what to lead away from: one for all, or one for each.
          image: PIL image, uint8 array or floats in 0..1, (H, W, 3); one for all, or a list with one for each. Its size is
            the result's.
          mask: of the image's size; white (0.5 and above) is made anew, the rest is held to the image, up to what the
            autoencoder changes of it. A UNet with the channels for it sees the mask; any other has it blended in after
            each step.
          strength: above 0, up to 1: how far back an image is noised, 0.8 unless said, and 1 with a mask.
          steps: of the scheduler; an image takes its share `strength` of them.
          guidance_scale: how far away from the negative prompt; 1 is none, at half the work, and then there can be no negative
            prompt either.
          guidance_rescale: phi of 2305.08891, section 3.4.
          seed: one number, whose picture i has the index first_index + i, or one for each, all with the index first_index.
          latents: standard normal noise (B, h, w, C) to begin with, in place of the seed's.
          scheduler: one of SCHEDULERS with the noise settings of the pipeline's own, or a Scheduler.
          height, width: in pixels, multiples of the autoencoder's `downscale`.
          clip_skip: how many of the text encoder's last layers are left out, the pipeline's own number unless said; for the
            negative prompt too (diffusers leaves them out for the prompt alone). kohya's and A1111's number is one more.
          output: "pil" images; "np", float32 (B, H, W, 3) in [0, 1]; or "latent", float32 (B, h, w, C) as the UNet has them.
          callback: called with (calls made, calls in all, preview) every `callback_every` calls of the UNet and at the end;
            preview(), to be called before the
            callback returns, decodes what there is, noise and all: uint8 (rows, H, W, 3). Prompts of several lengths are made one
            length after the other, and rows are those of one length.
          noise: standard normal numbers in place of the seed's: "image" and "masked" (B, h, w, C) for the draws from the
            autoencoder's posterior, "steps" (M, B, h, w, C) for the stochastic schedulers.
          params: other parameters than the pipeline's own, for some or all of its models.

        Raises:
          ValueError, TypeError: an argument that cannot be, by name. FloatingPointError: a picture that is not finite, by
          its prompt and seed.
        """
        if output not in ("pil", "np", "latent"):
            raise ValueError(f"output={output!r} is unknown; use 'pil', 'np' or 'latent'")
        request = self._request(
            prompt,
            scheduler=scheduler,
            negative_prompt=negative_prompt,
            image=image,
            mask=mask,
            strength=strength,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            seed=seed,
            first_index=first_index,
            latents=latents,
            height=height,
            width=width,
            clip_skip=clip_skip,
            noise=noise,
        )
        weights = self.params if params is None else {**self.params, **place(self.mesh, params)}
        groups = self._by_length(request)
        report = Report(callback, callback_every, request.plan.calls, len(groups))
        made: list[np.ndarray] = [np.empty(0)] * len(request.prompts)
        for rows, words in groups:
            for row, array in zip(rows, self._make(request, rows, words, weights, output, report), strict=True):
                made[row] = array
        result = np.stack(made)
        self._check(request, result)
        if output == "pil":
            return [Image.fromarray(picture) for picture in to_uint8(result)]
        return result if output == "latent" else np.clip(result / 2.0 + 0.5, 0.0, 1.0)

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """The text encoder's output for prompts, as the UNet takes it: (B, S, E), S as long as the longest takes."""
        ids_BS, weights_BS = tokens.weighted(self.tokenizer, prompts)
        words = spread(self.mesh, {"ids": ids_BS, "weights": weights_BS})
        made = self._encode_text(self.params["text"], words["ids"], words["weights"], clip_skip=self.clip_skip)
        return gather(made)[: len(ids_BS)]

    def latents_of(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Pictures, uint8, as the UNet has them: the means of the autoencoder's posteriors, float32 (B, h, w, C)."""
        B, H, W, _ = images_BHWC.shape
        step = self.geometry.downscale
        noise = np.zeros((B, H // step, W // step, self.geometry.channels), np.float32)
        rows = spread(self.mesh, {"x": images_BHWC.astype(np.float32) / 127.5 - 1.0, "noise": noise})
        return gather(self._encode_image(self.params["vae"], rows["x"], rows["noise"]))[:B]

    def decode(self, x_BhwC: np.ndarray) -> np.ndarray:
        """Latents as the UNet has them -> uint8 (B, H, W, 3)."""
        rows = spread(self.mesh, {"x": x_BhwC})["x"]
        return to_uint8(self._decode(self.params["vae"], rows)[: len(x_BhwC)])

    def facts(self, prompt: str | Sequence[str], **settings: Any) -> list[dict[str, Any]]:
        """What makes each picture of a call with these arguments, for a PNG's text; those of the output are not among them."""
        request = self._request(prompt, **settings)
        shared: dict[str, Any] = {"model": self.model_hash, "jdiff": __version__}
        if self.loras:
            shared["lora"] = dict(self.loras)
        return [{**facts, **shared} for facts in request.facts()]

    @cached_property
    def model_hash(self) -> str:
        """Sixteen hex digits of all parameters' values."""
        return tree.fingerprint(self.params)

    def _request(
        self,
        prompt: str | Sequence[str],
        *,
        scheduler: str | Scheduler | None = None,
        clip_skip: int | None = None,
        **settings: Any,
    ) -> Request:
        """The arguments completed by what is the pipeline's own."""
        if not isinstance(scheduler, Scheduler):
            scheduler = self.scheduler if scheduler is None else self.scheduler.replace_kind(scheduler)
        clip_skip = self.clip_skip if clip_skip is None else clip_skip
        return make_request(self.geometry, scheduler, prompt, clip_skip=clip_skip, **settings)

    def _by_length(self, request: Request) -> list[tuple[list[int], dict[str, np.ndarray]]]:
        """Rows that take as many chunks of text, with their ids and weights (rows, S), prompts' and negatives'.

        Rows are not filled up to the batch's longest: the empty chunks would change their pictures.
        """
        groups: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
        for row, pair in enumerate(zip(request.prompts, request.negatives, strict=True)):
            ids, weights = tokens.weighted(self.tokenizer, pair if request.guidance_scale != 1 else pair[:1])
            groups.setdefault(ids.shape[1], []).append((row, ids, weights))
        found = []
        for group in groups.values():
            rows, ids, weights = zip(*group, strict=True)
            ids_BNS, weights_BNS = np.stack(ids), np.stack(weights)
            words = {"ids": ids_BNS[:, 0], "weights": weights_BNS[:, 0]}
            if request.guidance_scale != 1:
                words |= {"null_ids": ids_BNS[:, 1], "null_weights": weights_BNS[:, 1]}
            found.append((list(rows), words))
        return found

    def _make(
        self,
        request: Request,
        rows: list[int],
        words: dict[str, np.ndarray],
        params: Mapping[str, Any],
        output: Output,
        report: Report,
    ) -> np.ndarray:
        """The pictures of some rows, (rows, H, W, 3) in [-1, 1], or their latents."""
        plan = request.plan
        state, x = self._begin(request, self._inputs(request, rows, words), params)
        loop = partial(self._loop, plan, request.guidance_rescale, params["unet"], state)
        carry = plan.init(x)
        for first, last in report.parts():
            x, carry = loop(x, carry, first, last)

            def pictures(x: jax.Array = x, i: int = last) -> np.ndarray:
                shown = x if i == plan.calls else plan.scale_input(x, i)
                return to_uint8(self._decode(params["vae"], shown)[: len(rows)])

            report(last, x, Preview(pictures, lambda x=x: gather(x)[: len(rows)]))
        if output == "latent":
            return gather(x)[: len(rows)]
        return self._decode(params["vae"], x)[: len(rows)]

    def _inputs(self, request: Request, rows: list[int], words: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """What some rows are made of, over the mesh: words, picture and mask, noise drawn or given, and the steps' keys."""
        given = dict(request.draws)
        if "steps" in given:
            given["steps"] = np.moveaxis(given["steps"], 0, 1)
        optional = {"latents": request.latents, "picture": request.images, "mask": request.masks}
        given |= {name: array for name, array in optional.items() if array is not None}
        given |= {name: np.array(getattr(request, name), np.uint32) for name in ("seeds", "indices")}
        calls = 1 if request.guidance_scale == 1 else 2
        inputs = spread(self.mesh, {**words, **{name: array[rows] for name, array in given.items()}}, calls)
        h, w = (n // self.geometry.downscale for n in request.size)
        drawn = self._draw(inputs.pop("seeds"), inputs.pop("indices"), shape=(h, w, self.geometry.channels))
        return {**drawn, **inputs}

    def _begin(
        self, request: Request, inputs: dict[str, jax.Array], params: Mapping[str, Any]
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """(what the loop reads at every step, the latents that it begins with)."""
        plan, noise = request.plan, inputs["latents"]
        state = {name: inputs[name] for name in ("keys", "steps") if name in inputs}
        encode = partial(self._encode_text, params["text"], clip_skip=request.clip_skip)
        state["context"] = encode(inputs["ids"], inputs["weights"])
        if "null_ids" in inputs:
            state["null"] = encode(inputs["null_ids"], inputs["null_weights"])
            state["scale"] = jnp.float32(request.guidance_scale)
        if "mask" in inputs:
            step = self.geometry.downscale
            state["mask"] = inputs["mask"][:, ::step, ::step]
        picture = partial(self._encode_image, params["vae"])
        if self.geometry.repaints:
            state["masked"] = picture(inputs["picture"] * (inputs["mask"] < 0.5), inputs["masked"])
        elif "mask" in inputs:
            state |= {"original": picture(inputs["picture"], inputs["image"]), "noise": noise}
        # as in diffusers, a mask at full strength forgets the picture wholly; a picture without one never does
        if "picture" not in inputs or ("mask" in inputs and plan.strength == 1.0):
            return state, noise * plan.init_noise_sigma
        original = state["original"] if "original" in state else picture(inputs["picture"], inputs["image"])
        return state, plan.add_noise(original, noise, 0)

    @cached_property
    def _draw(self) -> Callable[..., dict[str, jax.Array]]:
        """Each row's random numbers from its seed and index: noise for its three uses, and a key for the steps."""

        def draw(seeds_B: jax.Array, indices_B: jax.Array, shape: tuple[int, ...]) -> dict[str, jax.Array]:
            one = lambda seed, index: jax.random.split(jax.random.fold_in(jax.random.key(seed), index), 4)  # noqa: E731
            keys_B4 = jax.vmap(one)(seeds_B, indices_B)
            names = ("latents", "image", "masked")
            noise = {name: diffusion.sample_noise(keys_B4[:, i], shape) for i, name in enumerate(names)}
            return over(self.mesh, {**noise, "keys": keys_B4[:, 3]})

        return jax.jit(draw, static_argnames="shape")

    @cached_property
    def _encode_text(self) -> Callable[..., jax.Array]:
        length = self.tokenizer.max_length

        def encode(params: Any, ids_BS: jax.Array, weights_BS: jax.Array, clip_skip: int) -> jax.Array:
            run = lambda ids: self.text.apply({"params": params}, ids, clip_skip=clip_skip)  # noqa: E731
            return over(self.mesh, tokens.apply_weights(tokens.encode_chunks(run, ids_BS, length), weights_BS, length))

        return jax.jit(encode, static_argnames="clip_skip")

    @cached_property
    def _encode_image(self) -> Callable[..., jax.Array]:
        def encode(params: Any, x_BHWC: jax.Array, noise_BhwC: jax.Array) -> jax.Array:
            def some(pair):
                posterior = self.vae.apply({"params": params}, pair[0], method="encode")
                return posterior.astype(jnp.float32).draw(pair[1]) * self.vae.scaling_factor

            at_once = self._at_once(*x_BHWC.shape[1:3])
            return over(self.mesh, in_slices(some, (x_BHWC, noise_BhwC), self.mesh, at_once))

        return jax.jit(encode)

    @cached_property
    def _loop(self) -> Callable[..., tuple[jax.Array, Carry]]:
        """Calls `first`..`last` - 1 of a plan: everything but the plan is traced, so each plan compiles once a shape."""
        return jax.jit(partial(_loop, self.mesh, self.unet), static_argnums=(0, 1), donate_argnums=(4, 5))

    @cached_property
    def _decode_rows(self) -> Callable[..., jax.Array]:
        def decode(params: Any, x_BhwC: jax.Array) -> jax.Array:
            def some(z_BhwC):
                z_BhwC = z_BhwC / self.vae.scaling_factor
                return self.vae.apply({"params": params}, z_BhwC, method="decode").astype(jnp.float32)

            at_once = self._at_once(*(self.geometry.downscale * n for n in x_BhwC.shape[1:3]))
            return in_slices(some, x_BhwC, self.mesh, at_once)

        return jax.jit(decode)

    def _decode(self, params: Any, x_BhwC: jax.Array) -> np.ndarray:
        """Latents as the UNet has them -> float32 (B, H, W, 3) on the host."""
        params, x_BhwC = on_fewest(self.mesh, (params, x_BhwC))
        decode = lambda x: gather(self._decode_rows(params, x))  # noqa: E731
        if max(x_BhwC.shape[1:3]) > TILED_ABOVE:
            return decode_tiled(decode, x_BhwC, self.geometry.downscale)
        return decode(x_BhwC)

    def _at_once(self, height: int, width: int) -> int:
        return max(1, PIXELS_AT_ONCE // (height * width))

    def _check(self, request: Request, result_BHWC: np.ndarray) -> None:
        bad = [i for i, x in enumerate(result_BHWC) if not np.isfinite(x).all()]
        if bad:
            names = ", ".join(
                f"{request.prompts[i]!r} (seed {request.seeds[i]}, index {request.indices[i]})" for i in bad[:3]
            )
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise FloatingPointError(
                f"NaN or infinity in the picture of {names}{more}: the weights are not sound, or a model's precision "
                f"is too low (UNet {jnp.dtype(self.unet.dtype)}, autoencoder {jnp.dtype(self.vae.dtype)}): use float32"
            )


def _loop(
    mesh: Mesh,
    unet: Any,
    plan: Plan,
    rescale: float,
    params: Any,
    state: dict[str, Any],
    x: jax.Array,
    carry: Carry,
    first: int,
    last: int,
) -> tuple[jax.Array, Carry]:
    """The denoising loop: guidance around the UNet, the scheduler around both, and the image kept outside the mask."""
    condition = {"context": state["context"]}
    if "masked" in state:
        condition["seen"] = jnp.concatenate([state["mask"], state["masked"]], axis=-1)

    def model(x_BhwC: jax.Array, t_B: jax.Array, y: dict[str, jax.Array]) -> jax.Array:
        if "seen" in y:
            x_BhwC = jnp.concatenate([x_BhwC, y["seen"]], axis=-1)
        return unet.apply({"params": params}, x_BhwC, t_B, y["context"]).astype(jnp.float32)

    null = {**condition, "context": state.get("null")}
    guided = diffusion.guide(pinned(mesh, model), condition, null, state.get("scale", 1), rescale=rescale)

    def keep(x_BhwC: jax.Array, i: jax.Array) -> jax.Array:
        mask = state["mask"]
        return (1.0 - mask) * plan.add_noise(state["original"], state["noise"], i) + mask * x_BhwC

    steps_BMhwC = state.get("steps")
    found = schedulers.run(
        plan,
        pinned(mesh, guided),
        x,
        state["keys"],
        first=first,
        last=last,
        carry=carry,
        after_step=keep if "mask" in state and "masked" not in state else None,
        noise_fn=None if steps_BMhwC is None else lambda i: steps_BMhwC[:, i],
    )
    return over(mesh, found)
