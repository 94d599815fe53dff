"""A LoRA step of Stable Diffusion 1.5's UNet, rank 8 on its attention: beside peft's, and beside the full step."""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Row, alone, alternate, close
from jdiff import convert, diffusion, lora, models, optim, train, tree
from jdiff.tasks import mean_gradient

RANK, SIZE = 8, 32
"""Of the adapters; of the latents, 256 x 256 pixels: full training at 512 does not fit a small machine."""
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def lora_steps(args: argparse.Namespace) -> Iterator[Row]:
    """One row for the LoRA step beside peft's, one for the full step and what LoRA spares of it."""
    wanted = args.only.split(",") if args.only else ["step", "full"]
    module = models.create("sd15/unet")
    base = jax.jit(lambda: module.init(jax.random.key(0), *module.dummy_inputs())["params"])()
    base = jax.tree.map(jnp.asarray, base)
    data = _data(args.batch)
    schedule = diffusion.make_schedule("scaled_linear")
    adapters = lora.init(jax.random.key(1), {"unet": base}, [lora.Rule("attn", RANK)])
    row: Row = {"case": f"lora step r{RANK} b{args.batch}"}
    ours, state = _step(module, schedule, data, {"lora": adapters, "unet": base}, r"(?!lora/).*|.*/scale")
    spared = _bytes(state)
    if "step" in wanted:
        if args.side == "jdiff":
            yield row | alone(ours)
            return
        theirs, error = _peft(args, module, base, adapters, data, schedule)
        if args.side == "torch":
            yield row | alone(theirs)
            return
        row |= {"error": error} | alternate({"jdiff": ours, "torch": theirs}, args.rounds)
        yield row
        del theirs
    if "full" in wanted and not args.side:
        full, full_state = _step(module, schedule, data, {"unet": base}, r"(?!)")
        share = spared / _bytes(full_state)
        times = alternate({"lora": ours, "full": full}, max(args.rounds // 3, 2))
        yield {
            "case": f"full step b{args.batch}",
            "jdiff_ms": times["full_ms"],
            "lora_ms": times["lora_ms"],
            "quicker": round(times["full_ms"] / times["lora_ms"], 2),
            "memory_share": round(share, 4),  # of gradients and optimizer
            "others": times["others"],
        }


def _data(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_0": rng.normal(size=(batch, SIZE, SIZE, 4)).astype(np.float32),
        "noise": rng.normal(size=(batch, SIZE, SIZE, 4)).astype(np.float32),
        "t": rng.integers(1, 1000, batch).astype(np.int32),
        "context": rng.normal(size=(batch, 77, 768)).astype(np.float32),
    }


def _bytes(state: train.TrainState) -> int:
    """Of the gradients and the optimizer's state."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))


def _loss(module: Any, schedule: Any, full: Any, batch: Any, keys_B: jax.Array) -> dict[str, jax.Array]:
    params = lora.attach({"unet": full["unet"]}, full["lora"]) if "lora" in full else full
    model_fn = lambda x, t: module.apply({"params": params["unet"]}, x, t, batch["context"])  # noqa: E731
    return diffusion.gaussian_loss(model_fn, schedule, batch["x_0"], batch["t"], batch["noise"])


def _step(module: Any, schedule: Any, data: Any, full: Any, frozen: str) -> tuple[Callable[[], None], train.TrainState]:
    """(a call of a training step as the trainer does it, its state before)."""
    tx = optim.make_optimizer(optim.make_schedule("constant", 1e-4, 0, 1))
    gradient = mean_gradient(functools.partial(_loss, module, schedule))
    run = functools.partial(train.train_step, gradient=gradient, tx=tx, ema=optim.Ema(0.999), seed=0)
    step, batch = jax.jit(run, donate_argnums=0), jax.tree.map(jnp.asarray, data)
    params, rest = tree.set_apart(full, frozen)
    params = jax.tree.map(jnp.copy, params)
    nothing = jax.tree.map(lambda _: None, rest)
    average = jax.tree.map(jnp.copy, params)
    state = train.TrainState(
        jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, rest), nothing, tx.init(params), average
    )
    shapes = jax.eval_shape(lambda: state)
    held = [state]

    def call() -> None:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    return call, shapes


def _peft(
    args: argparse.Namespace, module: Any, base: Any, adapters: Any, data: Any, schedule: Any
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
    ours = lora.by_path(adapters)
    for name, parameter in by_module.items():
        path = name.split(".lora_")[0]
        adapter = next(v for k, v in ours.items() if _dotted(k) == path)
        part = adapter["a"] if ".lora_A." in name else adapter["b"]
        parameter.data.copy_(torch.tensor(np.array(part)).T)
    nchw = lambda x: torch.tensor(x).permute(0, 3, 1, 2).contiguous()  # noqa: E731
    x_0, noise, t, context = (
        nchw(data["x_0"]),
        nchw(data["noise"]),
        torch.tensor(data["t"]).long(),
        torch.tensor(data["context"]),
    )
    abar = torch.tensor(np.asarray(schedule.alphas_cumprod, np.float32))[t].reshape(-1, 1, 1, 1)
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise
    optimizer = torch.optim.AdamW(by_module.values(), lr=1e-4, weight_decay=0.0)

    def backward() -> Any:
        optimizer.zero_grad()
        loss = (peer(x_t, t, context).sample - noise).square().mean()
        loss.backward()
        return loss

    def total(trained: Any) -> jax.Array:
        return _loss(module, schedule, {"unet": base, "lora": trained}, jax.tree.map(jnp.asarray, data), None)[
            "loss"
        ].mean()

    if not args.side:
        loss, grads = jax.jit(jax.value_and_grad(total))(adapters)
        error = close("loss", loss, backward().detach(), 1e-4)
        found = lora.by_path(grads)
        for name, parameter in by_module.items():
            if ".lora_B." in name:  # a's gradient is zero while b is
                path = next(k for k in found if _dotted(k) == name.split(".lora_")[0])
                error = max(error, close(f"gradient of {name}", found[path]["b"].T, parameter.grad, 2e-3))
    else:
        error = 0.0

    def theirs() -> float:
        loss = backward()
        optimizer.step()
        return loss.item()

    return theirs, error


def _dotted(path: str) -> str:
    """Our path of a kernel in diffusers' spelling."""
    from jdiff.convert.unet import dotted

    return dotted(None, path.removeprefix("unet/").removesuffix("/kernel"))
