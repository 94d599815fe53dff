"""DiT-S/2 on 32x32x4 latents: forward, a training step, DDIM with guidance."""

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from benchmarks.devices import over_devices
from benchmarks.timing import Call, Row, beside_torch, close
from benchmarks.weights import random_dit
from jdiff import convert, diffusion, optim, sharding, train
from jdiff.diffusion.process import Process
from jdiff.tasks import mean_gradient
from jdiff.tasks.class_to_image import class_loss


def torch_dit(model: Any, params: Any) -> Any:
    """diffusers' DiT with the same weights. One timestep and label embedder serves all blocks, as in the official code,
    where diffusers keeps a copy a block and runs every one: its forward alone would be slower by that."""
    import torch
    from diffusers import DiTTransformer2DModel

    peer = DiTTransformer2DModel(
        num_attention_heads=model.heads,
        attention_head_dim=model.width // model.heads,
        in_channels=model.channels,
        out_channels=model.channels * (1 + model.learn_sigma),
        num_layers=model.depth,
        sample_size=model.image_size,
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
        norm_eps=1e-6,
    ).eval()
    embedder = peer.transformer_blocks[0].norm1.emb
    embedder.time_proj.downscale_freq_shift = 0  # the official frequencies; diffusers' own are i / 127, not i / 128
    for block in peer.transformer_blocks:
        block.norm1.emb = embedder
    peer.load_state_dict({name: torch.tensor(value) for name, value in convert.to_torch(model, params).items()})
    peer.pos_embed.pos_embed.copy_(torch.tensor(np.asarray(params["pos_embed"])))
    return peer


def torch_loss(schedule: diffusion.Schedule, peer: Any) -> Callable[..., Any]:
    """DiT's loss in PyTorch: mean MSE of eps plus the variational bound in bits, over a batch (x_0, t, noise, y), NCHW."""
    import torch

    table = lambda values: torch.tensor(np.asarray(values, np.float32)).reshape(-1, 1, 1, 1)  # noqa: E731
    abar, betas = schedule.alphas_cumprod, schedule.betas
    signal, noise_std, recip, recip_m1 = map(table, (abar**0.5, (1 - abar) ** 0.5, abar**-0.5, (1 / abar - 1) ** 0.5))
    of_x_0, of_x_t = map(table, schedule.posterior_mean_coefs)
    low, high = table(schedule.posterior_log_variance), table(np.log(betas))
    cdf = lambda z: 0.5 * (1 + torch.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3)))  # noqa: E731

    def loss(x_0, t, noise, y):
        x_t = signal[t] * x_0 + noise_std[t] * noise
        eps, v = peer(x_t, t, y, return_dict=False)[0].chunk(2, dim=1)
        mse = (noise - eps).square().mean()
        fixed, frac = eps.detach(), (v + 1) / 2
        mean = of_x_0[t] * (recip[t] * x_t - recip_m1[t] * fixed) + of_x_t[t] * x_t
        log_var = frac * high[t] + (1 - frac) * low[t]
        ratio = log_var - low[t]
        error = of_x_0[t] * x_0 + of_x_t[t] * x_t - mean
        kl = 0.5 * (ratio - 1 + torch.exp(-ratio) + error.square() * torch.exp(-log_var))
        inverse = torch.exp(-0.5 * log_var)
        upper, lower = cdf(inverse * (x_0 - mean + 1 / 255)), cdf(inverse * (x_0 - mean - 1 / 255))
        mass = torch.where(x_0 < -0.999, upper, torch.where(x_0 > 0.999, 1 - lower, upper - lower))
        nll = -torch.log(mass.clamp(min=1e-12))
        vb = torch.where(t == 0, nll.mean((1, 2, 3)), kl.mean((1, 2, 3))) / np.log(2)
        return mse + vb.mean()

    return loss


def dit(args: argparse.Namespace) -> Iterator[Row]:
    """One row a part."""
    macs = jdiff.create(args.model).macs() * args.batch
    cases = {
        "forward": (forward, torch_forward, check_forward, 2 * macs, args.rounds, 3),
        "train": (training, torch_training, check_training, 6 * macs, args.rounds, 1),
        "ddim": (ddim, torch_ddim, check_ddim, 4 * macs * args.steps, max(args.rounds // 2, 3), 1),
    }
    for name, (ours, theirs, check, flops, rounds, calls) in cases.items():
        if not args.only or name in args.only.split(","):
            title = f"{args.model} {name} b{args.batch}"
            yield beside_torch(title, ours, theirs, check, args, rounds, calls, flops)


def _model(args: argparse.Namespace) -> tuple[Any, Any]:
    model = jdiff.create(args.model, dtype=jnp.float32, **args.shape)
    return model, random_dit(model)


def _data(args: argparse.Namespace, model: Any) -> tuple[np.ndarray, ...]:
    """(x_0, t, noise, y), the same in every process."""
    rng = np.random.default_rng(1)
    shape = (args.batch, model.image_size, model.image_size, model.channels)
    return (
        rng.uniform(-1, 1, shape).astype(np.float32),
        rng.integers(1, 1000, args.batch).astype(np.int32),
        rng.normal(size=shape).astype(np.float32),
        rng.integers(0, model.num_classes, args.batch).astype(np.int32),
    )


def _torch_data(args: argparse.Namespace, model: Any) -> tuple[Any, ...]:
    import torch

    x_0, t, noise, y = _data(args, model)
    nchw = lambda x: torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))  # noqa: E731
    return nchw(x_0), torch.tensor(t).long(), nchw(noise), torch.tensor(y).long()


def forward(args: argparse.Namespace) -> Call:
    model, params = _model(args)
    x, t, _, y = _data(args, model)
    apply = jax.jit(lambda params, x, t, y: model.apply({"params": params}, x, t, y))
    params, inputs = over_devices(params, x, t, y)
    return lambda: apply(params, *inputs).block_until_ready()


def torch_forward(args: argparse.Namespace) -> Call:
    import torch

    model, params = _model(args)
    peer, (x, t, _, y) = torch_dit(model, params), _torch_data(args, model)
    return torch.inference_mode()(lambda: peer(x, t, y, return_dict=False)[0])


def check_forward(args: argparse.Namespace) -> float:
    return close("forward", forward(args)(), torch_forward(args)().permute(0, 2, 3, 1), 1e-4)


LR, EMA = 1e-4, optim.Ema(0.9999)


def training(args: argparse.Namespace) -> Call:
    """Forward, backward, AdamW and the average, with fresh t and noise a step on both sides."""
    model, params = _model(args)
    x_0, _, _, y = _data(args, model)
    tx = optim.make_optimizer(optim.make_schedule("constant", LR, 0, 1))
    gradient = mean_gradient(class_loss(model, Process(diffusion.make_schedule("linear"), variance="learned_range")))
    mesh = sharding.make_mesh()
    batch = sharding.put_batch(mesh, {"latent": x_0, "label": y})
    state = train.make_state({"dit": params}, tx, f"dit/({model.frozen})")
    placed = sharding.shardings(mesh, state)
    step, held = train.jitted_step(mesh, placed, gradient, tx=tx, ema=EMA, seed=0), [jax.device_put(state, placed)]

    def call() -> None:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    return call


def torch_training(args: argparse.Namespace) -> Call:
    import torch

    model, params = _model(args)
    peer = torch_dit(model, params)
    peer_average = copy.deepcopy(peer)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=LR, weight_decay=0.0, fused=True)
    loss_of = torch_loss(diffusion.make_schedule("linear"), peer)
    x_0, _, _, y = _torch_data(args, model)
    averaged, trained = list(peer_average.parameters()), list(peer.parameters())

    def call() -> float:
        t = torch.randint(0, 1000, (len(x_0),))
        optimizer.zero_grad()
        loss = loss_of(x_0, t, torch.randn_like(x_0), y)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, trained, 1 - EMA.decay)
        return loss.item()

    return call


def check_training(args: argparse.Namespace) -> float:
    """Loss and gradients of given t and noise."""
    model, params = _model(args)
    schedule = diffusion.make_schedule("linear")

    def fixed_loss(params, x_0, t, noise, y):
        denoise = lambda x, t: model.apply({"params": params}, x, t, y)  # noqa: E731
        return diffusion.gaussian_loss(denoise, schedule, x_0, t, noise)["loss"].mean()

    loss, grads = jax.jit(jax.value_and_grad(fixed_loss))(params, *map(jnp.asarray, _data(args, model)))
    peer = torch_dit(model, params)
    expected = torch_loss(schedule, peer)(*_torch_data(args, model))
    expected.backward()
    error = close("loss", loss, expected.detach(), 1e-4)
    # positions have no gradient in the peer, and must be the fixed ones in its names
    found = convert.to_torch(model, {**grads, "pos_embed": params["pos_embed"]})
    for name, parameter in peer.named_parameters():
        if not name.endswith("to_k.bias"):  # softmax makes its gradient exactly zero
            error = max(error, close(f"gradient of {name}", found[name], parameter.grad, 2e-4))
    return error


GUIDANCE = 4.0


def ddim(args: argparse.Namespace) -> Call:
    model, params = _model(args)
    _, _, x_T, y = _data(args, model)
    respaced = diffusion.respace(diffusion.make_schedule("linear"), args.steps, "leading")

    @jax.jit
    def sample(params, x_T, y):
        denoise = lambda x, t, y: model.apply({"params": params}, x, t, y)  # noqa: E731
        return diffusion.ddim(diffusion.guide(denoise, y, model.null_label, GUIDANCE), respaced, x_T, steps=None)

    params, rows = over_devices(params, x_T, y)
    return lambda: sample(params, *rows).block_until_ready()


def torch_ddim(args: argparse.Namespace) -> Call:
    import torch
    from diffusers import DDIMScheduler

    model, params = _model(args)
    peer, (_, _, x_T, y) = torch_dit(model, params), _torch_data(args, model)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(args.steps)
    both = torch.cat([y, torch.full_like(y, model.null_label)])

    @torch.inference_mode()
    def call():
        x = x_T
        for t in scheduler.timesteps:
            eps = peer(torch.cat([x, x]), t.expand(len(both)), both, return_dict=False)[0][:, : model.channels]
            cond, uncond = eps.chunk(2)
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x).prev_sample
        return x

    return call


def check_ddim(args: argparse.Namespace) -> float:
    return close("samples", ddim(args)(), torch_ddim(args)().permute(0, 2, 3, 1), 1e-3)
