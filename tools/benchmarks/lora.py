"""A LoRA step of Stable Diffusion 1.5's UNet, rank 8 on its attention: beside the full step, and beside peft's."""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sd import torch_unet_module
from benchmarks.timing import Call, Row, beside_torch, close, in_sequence
from benchmarks.weights import moved
from jdiff import diffusion, lora, models, optim, sharding, train
from jdiff.convert.unet import dotted
from jdiff.tasks import NOTHING, mean_gradient
from jdiff.tasks.adapters import Adapters

RANK, SIZE = 8, 32
"""Of the adapters; of the latents, 256 x 256 pixels: full training at 512 does not fit a small machine."""
UNET = "sd15/unet"
LR = 1e-4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def lora_steps(args: argparse.Namespace) -> Iterator[Row]:
    """One row for the full step and what LoRA spares of it; one for the LoRA step beside peft's."""
    cases = {"full": _beside_full, "step": _beside_peft}
    for name in args.only.split(",") if args.only else cases:
        yield cases[name](args)


def _beside_peft(args: argparse.Namespace) -> Row:
    return beside_torch(f"lora step r{RANK} b{args.batch}", lora_step, peft_step, check, args, args.rounds)


def _beside_full(args: argparse.Namespace) -> Row:
    row: Row = {"case": f"lora full b{args.batch}"}
    row |= in_sequence({"jdiff": full_step, "lora": lora_step}, args, max(args.rounds // 2, 3))
    row["quicker"] = round(row["jdiff_ms"] / row["lora_ms"], 2)
    row["memory_share"] = round(_held(_with_adapters, Adapters.frozen) / _held(_base, NOTHING), 4)
    return row


def _base() -> Any:
    """The UNet, random weights, none of which is zero."""
    return {"unet": moved(models.create(UNET))}


def _with_adapters() -> Any:
    base = _base()
    return base | {"lora": lora.init(jax.random.key(1), base, [lora.Rule("attn", RANK)])}


def _fresh(full: Any, frozen: str) -> train.TrainState:
    return train.make_state(full, _optimizer(), frozen)


def _optimizer() -> Any:
    return optim.make_optimizer(optim.make_schedule("constant", LR, 0, 1))


def _held(full: Callable[[], Any], frozen: str) -> int:
    """Bytes of a step's gradients and optimizer."""
    state = jax.eval_shape(lambda: _fresh(full(), frozen))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.opt_state)))


def _data(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_0": rng.normal(size=(batch, SIZE, SIZE, 4)).astype(np.float32),
        "noise": rng.normal(size=(batch, SIZE, SIZE, 4)).astype(np.float32),
        "t": rng.integers(1, 1000, batch).astype(np.int32),
        "context": rng.normal(size=(batch, 77, 768)).astype(np.float32),
    }


def _loss(module: Any, full: Any, batch: Any, keys_B: Any) -> dict[str, jax.Array]:
    params = lora.attach({"unet": full["unet"]}, full["lora"]) if "lora" in full else full
    model_fn = lambda x, t: module.apply({"params": params["unet"]}, x, t, batch["context"])  # noqa: E731
    schedule = diffusion.make_schedule("scaled_linear")
    return diffusion.gaussian_loss(model_fn, schedule, batch["x_0"], batch["t"], batch["noise"], variance="fixed_small")


def full_step(args: argparse.Namespace) -> Call:
    return _step(args, _base(), NOTHING)


def lora_step(args: argparse.Namespace) -> Call:
    return _step(args, _with_adapters(), Adapters.frozen)


def _step(args: argparse.Namespace, full: Any, frozen: str) -> Call:
    """A training step as the trainer does it. Takes `full`'s arrays."""
    mesh = sharding.make_mesh()
    gradient = mean_gradient(functools.partial(_loss, models.create(UNET)))
    fresh, batch = _fresh(full, frozen), sharding.put_batch(mesh, _data(args.batch))
    placed = sharding.shardings(mesh, fresh)
    step = train.jitted_step(mesh, placed, gradient, tx=_optimizer(), ema=optim.Ema(0.999), seed=0)
    state = [jax.device_put(fresh, placed)]

    def call() -> None:
        state[0], metrics = step(state[0], batch)
        jax.block_until_ready((state[0], metrics))

    return call


def _peft(args: argparse.Namespace, full: Any) -> tuple[dict[str, Any], Callable[[], Any]]:
    """(the adapters' parameters in peft by name, what computes the loss and their gradients), of the same weights."""
    import torch
    from peft import LoraConfig

    peer = torch_unet_module(models.create(UNET), full["unet"])
    peer.requires_grad_(False)
    peer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    by_module = {name: value for name, value in peer.named_parameters() if value.requires_grad}
    ours = _by_module(full["lora"])
    for name, parameter in by_module.items():
        part = ours[name.split(".lora_")[0]]["a" if ".lora_A." in name else "b"]
        parameter.data.copy_(torch.tensor(np.array(part)).T)
    data = {name: torch.tensor(value) for name, value in _data(args.batch).items()}
    x_0, noise = (data[name].permute(0, 3, 1, 2).contiguous() for name in ("x_0", "noise"))
    t, context = data["t"].long(), data["context"]
    schedule = diffusion.make_schedule("scaled_linear")
    abar = torch.tensor(np.asarray(schedule.alphas_cumprod, np.float32))[t].reshape(-1, 1, 1, 1)
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise

    def backward() -> Any:
        loss = (peer(x_t, t, context).sample - noise).square().mean()
        loss.backward()
        return loss

    return by_module, backward


def peft_step(args: argparse.Namespace) -> Call:
    import torch

    trained, backward = _peft(args, _with_adapters())
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0)

    def call() -> float:
        optimizer.zero_grad()
        loss = backward()
        optimizer.step()
        return loss.item()

    return call


def check(args: argparse.Namespace) -> float:
    """Loss and gradients of both, from the same weights."""
    full = _with_adapters()
    by_module, backward = _peft(args, full)

    def total(trained: Any, base: Any) -> jax.Array:
        batch = jax.tree.map(jnp.asarray, _data(args.batch))
        return _loss(models.create(UNET), {"unet": base, "lora": trained}, batch, None)["loss"].mean()

    loss, grads = jax.jit(jax.value_and_grad(total))(full["lora"], full["unet"])
    error = close("loss", loss, backward().detach(), 1e-4)
    found = _by_module(grads)
    for name, parameter in by_module.items():
        if ".lora_B." in name:  # a's gradient is zero while b is
            ours_b = found[name.split(".lora_")[0]]["b"]
            error = max(error, close(f"gradient of {name}", ours_b.T, parameter.grad, 2e-3))
    return error


def _by_module(adapters: Any) -> dict[str, Any]:
    """Adapters by diffusers' name of their module."""
    names = {path: path.removeprefix("unet/").removesuffix("/kernel") for path in lora.by_path(adapters)}
    return {dotted(None, names[path]): parts for path, parts in lora.by_path(adapters).items()}
