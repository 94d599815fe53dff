"""A LoRA step of Stable Diffusion 1.5's UNet, rank 8 on its attention: beside the full step, and beside peft's."""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Busy, Row, alone, alternate, close, timed
from jdiff import convert, diffusion, lora, models, optim, sharding, train
from jdiff.convert.unet import dotted
from jdiff.tasks import NOTHING, mean_gradient
from jdiff.tasks.adapters import Adapters

RANK, SIZE = 8, 32
"""Of the adapters; of the latents, 256 x 256 pixels: full training at 512 does not fit a small machine."""
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def lora_steps(args: argparse.Namespace) -> Iterator[Row]:
    """One row for the full step and what LoRA spares of it, on one device; one for the LoRA step beside peft's, on all.

    The full step first: it needs nearly all of a small machine's memory, in one piece.
    """
    cases = {"full": _beside_full, "step": _beside_peft}
    for name in args.only.split(",") if args.only else cases:
        yield cases[name](args)


def _beside_peft(args: argparse.Namespace) -> Row:
    module, base, adapters = _weights()
    data = _data(args.batch)
    row: Row = {"case": f"lora step r{RANK} b{args.batch}"}
    theirs, error = _peft(args, module, base, adapters, data) if args.side != "jdiff" else (None, 0.0)
    if args.side == "torch":
        return row | alone(theirs)
    ours, _ = _step(sharding.make_mesh(), module, data, {"lora": adapters, "unet": base}, Adapters.frozen)
    if args.side == "jdiff":
        return row | alone(ours)
    return row | {"error": error} | alternate({"jdiff": ours, "torch": theirs}, args.rounds)


def _beside_full(args: argparse.Namespace) -> Row:
    """One after the other, since both do not fit the memory of a small machine."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    rounds, times, held, busy = max(args.rounds // 2, 3), {}, {}, Busy()
    for name in ("lora", "full"):
        module, base, adapters = _weights()
        full, frozen = (
            ({"lora": adapters, "unet": base}, Adapters.frozen) if name == "lora" else ({"unet": base}, NOTHING)
        )
        step, held[name] = _step(mesh, module, _data(args.batch), full, frozen)
        del full, base
        times[name] = timed(step, rounds)
        del step
    return {
        "case": f"lora full b{args.batch}",
        "jdiff_ms": times["full"],
        "lora_ms": times["lora"],
        "quicker": round(times["full"] / times["lora"], 2),
        "memory_share": round(held["lora"] / held["full"], 4),  # of gradients and optimizer
        "others": busy.others(),
    }


def _weights() -> tuple[Any, Any, Any]:
    """The UNet, random weights, none of which is zero, and adapters of it."""
    module = models.create("sd15/unet")

    def random(key: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(module.init(key, *module.dummy_inputs())["params"])
        keys = jax.random.split(key, len(leaves))
        moved = [x + 0.01 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, moved)

    base = jax.jit(random)(jax.random.key(0))
    return module, base, lora.init(jax.random.key(1), {"unet": base}, [lora.Rule("attn", RANK)])


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


def _step(mesh: Any, module: Any, data: Any, full: Any, frozen: str) -> tuple[Callable[[], None], int]:
    """(a call of a training step as the trainer does it, bytes of its gradients and optimizer). Takes `full`'s arrays."""
    tx = optim.make_optimizer(optim.make_schedule("constant", 1e-4, 0, 1))
    gradient = mean_gradient(functools.partial(_loss, module))
    fresh, batch = train.make_state(full, tx, frozen), sharding.put_batch(mesh, data)
    placed = sharding.shardings(mesh, fresh)
    step = train.jitted_step(mesh, placed, gradient, tx=tx, ema=optim.Ema(0.999), seed=0)
    state = [jax.device_put(fresh, placed)]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state[0].params, state[0].opt_state)))

    def call() -> None:
        state[0], metrics = step(state[0], batch)
        jax.block_until_ready((state[0], metrics))

    return call, size


def _peft(
    args: argparse.Namespace, module: Any, base: Any, adapters: Any, data: Any
) -> tuple[Callable[[], Any], float]:
    """(peft's step on the same weights, the largest relative difference of loss and gradients)."""
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    peer = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    peer.load_state_dict({k: torch.tensor(np.array(v)) for k, v in convert.to_torch(module, base).items()})
    peer.requires_grad_(False)
    peer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    by_module = {name: value for name, value in peer.named_parameters() if value.requires_grad}
    ours = _by_module(adapters)
    for name, parameter in by_module.items():
        part = ours[name.split(".lora_")[0]]["a" if ".lora_A." in name else "b"]
        parameter.data.copy_(torch.tensor(np.array(part)).T)
    nchw = lambda x: torch.tensor(x).permute(0, 3, 1, 2).contiguous()  # noqa: E731
    x_0, noise, t, context = (
        nchw(data["x_0"]),
        nchw(data["noise"]),
        torch.tensor(data["t"]).long(),
        torch.tensor(data["context"]),
    )
    schedule = diffusion.make_schedule("scaled_linear")
    abar = torch.tensor(np.asarray(schedule.alphas_cumprod, np.float32))[t].reshape(-1, 1, 1, 1)
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise
    optimizer = torch.optim.AdamW(by_module.values(), lr=1e-4, weight_decay=0.0)

    def backward() -> Any:
        optimizer.zero_grad()
        loss = (peer(x_t, t, context).sample - noise).square().mean()
        loss.backward()
        return loss

    def total(trained: Any, base: Any) -> jax.Array:
        full, batch = {"unet": base, "lora": trained}, jax.tree.map(jnp.asarray, data)
        return _loss(module, full, batch, None)["loss"].mean()

    if not args.side:
        loss, grads = jax.jit(jax.value_and_grad(total))(adapters, base)
        error = close("loss", loss, backward().detach(), 1e-4)
        found = _by_module(grads)
        for name, parameter in by_module.items():
            if ".lora_B." in name:  # a's gradient is zero while b is
                ours_b = found[name.split(".lora_")[0]]["b"]
                error = max(error, close(f"gradient of {name}", ours_b.T, parameter.grad, 2e-3))
    else:
        error = 0.0

    def theirs() -> float:
        loss = backward()
        optimizer.step()
        return loss.item()

    return theirs, error


def _by_module(adapters: Any) -> dict[str, Any]:
    """Adapters by diffusers' name of their module."""
    names = {path: path.removeprefix("unet/").removesuffix("/kernel") for path in lora.by_path(adapters)}
    return {dotted(None, names[path]): parts for path, parts in lora.by_path(adapters).items()}
