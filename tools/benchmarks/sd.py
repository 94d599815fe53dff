"""Stable Diffusion 1.5 at full size: the UNet's forward pass on 64x64 latents, and the autoencoder's decoding to 512x512."""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.devices import over_devices
from benchmarks.timing import Call, Row, beside_torch, close
from benchmarks.weights import moved
from jdiff import convert, models
from jdiff.models.macs import macs_of


def sd(args: argparse.Namespace) -> Iterator[Row]:
    """One row a part."""
    for name, part in {"unet": _unet, "vae": vae}.items():
        if not args.only or name in args.only.split(","):
            yield from part(args)


def _unet(args: argparse.Namespace) -> Iterator[Row]:
    title, flops = f"sd unet b{args.batch}", 2 * _unet_macs(args)
    yield beside_torch(title, unet, torch_unet, check_unet, args, args.rounds, flops=flops)


def vae(args: argparse.Namespace) -> Iterator[Row]:
    """The autoencoder alone."""
    flops = 2 * _decoding_macs(args)
    yield beside_torch("sd vae decode 512x512", decode, torch_decode, check_decode, args, args.rounds, flops=flops)


def torch_unet_module(module: Any, params: Any) -> Any:
    """diffusers' UNet of SD 1.5 with the same weights."""
    from diffusers import UNet2DConditionModel

    peer = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).eval()
    peer.load_state_dict(tensors(module, params))
    return peer


def tensors(module: Any, params: Any) -> dict[str, Any]:
    """diffusers' state dict of a module."""
    import torch

    return {name: torch.from_dlpack(array) for name, array in convert.to_torch(module, params).items()}


def _unet_inputs(args: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """(x, t, context)."""
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(args.batch, 64, 64, 4)), rng.normal(size=(args.batch, 77, 768))
    return x.astype(np.float32), np.full(args.batch, 500), context.astype(np.float32)


def unet(args: argparse.Namespace) -> Call:
    module = models.create("sd15/unet")
    params, inputs = over_devices(moved(module), *_unet_inputs(args))
    forward = jax.jit(module.apply)
    return lambda: forward({"params": params}, *inputs).block_until_ready()


def torch_unet(args: argparse.Namespace) -> Call:
    import torch

    module = models.create("sd15/unet")
    peer = torch_unet_module(module, moved(module))
    x, t, context = map(torch.tensor, _unet_inputs(args))
    x = x.permute(0, 3, 1, 2).contiguous()
    return torch.inference_mode()(lambda: peer(x, t, context).sample)


def check_unet(args: argparse.Namespace) -> float:
    return close("unet", unet(args)(), torch_unet(args)().permute(0, 2, 3, 1), 1e-4)


LATENT = np.random.default_rng(0).normal(size=(1, 64, 64, 4)).astype(np.float32)


def _unet_macs(args: argparse.Namespace) -> int:
    return args.batch * models.create("sd15/unet").macs()


def _decoding_macs(args: argparse.Namespace) -> int:
    vae = models.create("sd15/vae")
    shapes = jax.eval_shape(lambda: vae.init(jax.random.key(0), *vae.dummy_inputs())["params"])
    return macs_of(lambda p, z: vae.apply({"params": p}, z, method="decode"), shapes, LATENT)


def decode(args: argparse.Namespace) -> Call:
    module = models.create("sd15/vae")
    params, z = moved(module), jnp.asarray(LATENT)
    apply = jax.jit(lambda params, z: module.apply({"params": params}, z, method="decode"))
    return lambda: apply(params, z).block_until_ready()


def torch_decode(args: argparse.Namespace) -> Call:
    import torch
    from diffusers import AutoencoderKL

    module = models.create("sd15/vae")
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    peer = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels).eval()
    peer.load_state_dict(tensors(module, moved(module)))
    z = torch.tensor(LATENT).permute(0, 3, 1, 2).contiguous()
    return torch.inference_mode()(lambda: peer.decode(z).sample)


def check_decode(args: argparse.Namespace) -> float:
    return close("vae", decode(args)(), torch_decode(args)().permute(0, 2, 3, 1), 1e-4)
