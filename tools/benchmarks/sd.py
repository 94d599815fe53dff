"""Stable Diffusion 1.5 at full size: the UNet's forward pass on 64x64 latents, and the autoencoder's decoding to 512x512."""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.devices import over_devices
from benchmarks.timing import Row, alone, alternate, close
from jdiff import convert, models
from jdiff.models.macs import macs_of

Case = tuple[Callable[[], Any], Callable[[], Any], int, str]
"""Both sides, the multiply-accumulates of a call, and a title."""


def sd(args: argparse.Namespace) -> Iterator[Row]:
    """One row a part."""
    import torch

    cases = {"unet": _unet, "vae": _vae}
    for name, case in cases.items():
        if args.only and name not in args.only.split(","):
            continue
        torch.manual_seed(0)
        with torch.inference_mode():
            ours, theirs, macs, title = case(args)
            row: Row = {"case": f"sd {name} {title}"}
            if args.side:
                row |= alone({"jdiff": ours, "torch": theirs}[args.side])
            else:
                row["error"] = close(name, ours(), theirs(), 1e-4)
                row |= alternate({"jdiff": ours, "torch": theirs}, args.rounds)
                row |= {
                    f"{side}_gflops": round(2 * macs / row[f"{side}_min_ms"] / 1e6, 1) for side in ("jdiff", "torch")
                }
        yield row


def _ours(peer: Any) -> tuple[Any, Any]:
    """The peer's module and weights in jdiff."""
    module = models.from_config(json.loads(peer.to_json_string()))
    arrays = {name: value.numpy() for name, value in peer.state_dict().items()}
    return module, jax.tree.map(jnp.asarray, convert.from_torch(module, arrays))


def _unet(args: argparse.Namespace) -> Case:
    import torch
    from diffusers import UNet2DConditionModel

    batch = args.batch
    peer = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).eval()
    module, params = _ours(peer)
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(batch, 64, 64, 4)), rng.normal(size=(batch, 77, 768))
    t = np.full(batch, 500)
    params, inputs = over_devices(params, x.astype(np.float32), t, context.astype(np.float32))
    peer_inputs = (
        torch.tensor(x).float().permute(0, 3, 1, 2).contiguous(),
        torch.tensor(t),
        torch.tensor(context).float(),
    )
    forward = jax.jit(module.apply)
    ours = lambda: forward({"params": params}, *inputs).block_until_ready()  # noqa: E731
    return ours, lambda: peer(*peer_inputs).sample.permute(0, 2, 3, 1), batch * module.macs(), f"b{batch}"


def _vae(args: argparse.Namespace) -> Case:
    import torch
    from diffusers import AutoencoderKL

    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    peer = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels).eval()
    module, params = _ours(peer)
    z = np.random.default_rng(0).normal(size=(1, 64, 64, 4)).astype(np.float32)
    peer_z = torch.tensor(z).permute(0, 3, 1, 2).contiguous()
    decode = jax.jit(lambda params, z: module.apply({"params": params}, z, method="decode"))
    ours = lambda: decode(params, jnp.asarray(z)).block_until_ready()  # noqa: E731
    macs = macs_of(lambda p, z: module.apply({"params": p}, z, method="decode"), params, jnp.asarray(z))
    return ours, lambda: peer.decode(peer_z).sample.permute(0, 2, 3, 1), macs, "decode 512x512"
