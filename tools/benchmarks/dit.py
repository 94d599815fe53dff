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
from benchmarks.timing import Row, alone, alternate, close
from jdiff import convert, diffusion, optim, sharding, train, tree
from jdiff.diffusion.process import Process
from jdiff.tasks import mean_gradient
from jdiff.tasks.class_to_image import class_loss


def random_params(model: Any, seed: int = 0) -> Any:
    """Weights that are nowhere zero, so that no product is trivial and no gradient vanishes."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.dummy_inputs())["params"])
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> jax.Array:
        if path == "pos_embed":
            return model.init(jax.random.key(0), *model.dummy_inputs())["params"]["pos_embed"]
        scale = 0.7 / np.sqrt(np.prod(leaf.shape[-2:-1])) if path.endswith("kernel") else 0.05
        return jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32)

    return tree.map_with_path(draw, shapes)


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
    """DiT-S/2 on 32x32x4 latents: forward, a training step, DDIM with guidance."""
    model = jdiff.create(args.model, dtype=jnp.float32)
    params = random_params(model)
    batch = args.batch
    rng = np.random.default_rng(1)
    x_0 = rng.uniform(-1, 1, (batch, model.image_size, model.image_size, model.channels)).astype(np.float32)
    noise = rng.normal(size=x_0.shape).astype(np.float32)
    t = rng.integers(1, 1000, batch).astype(np.int32)
    y = rng.integers(0, model.num_classes, batch).astype(np.int32)
    data = (x_0, t, noise, y)
    flops = 2 * model.macs() * batch
    for name, case in {"forward": _dit_forward, "train": _dit_train, "ddim": _dit_ddim}.items():
        if not args.only or name in args.only.split(","):
            row = {"case": f"{args.model} {name} b{batch}"} | case(args, model, params, data)
            times = {"forward": flops, "train": 3 * flops, "ddim": 2 * flops * args.steps}
            for side in ("jdiff", "torch"):
                if f"{side}_min_ms" in row:
                    row[f"{side}_gflops"] = round(times[name] / row[f"{side}_min_ms"] / 1e6, 1)
            yield row


def _nchw(x: np.ndarray) -> Any:
    import torch

    return torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _dit_forward(args: argparse.Namespace, model: Any, params: Any, data: tuple[np.ndarray, ...]) -> Row:
    import torch

    x, t, _, y = data
    forward = jax.jit(lambda params, x, t, y: model.apply({"params": params}, x, t, y))
    params, inputs = over_devices(params, x, t, y)
    ours = lambda: forward(params, *inputs).block_until_ready()  # noqa: E731
    if args.side == "jdiff":
        return alone(ours)
    peer = torch_dit(model, params)
    peer_inputs = (_nchw(x), torch.tensor(t), torch.tensor(y))
    with torch.inference_mode():
        theirs = lambda: peer(*peer_inputs, return_dict=False)[0]  # noqa: E731
        if args.side == "torch":
            return alone(theirs)
        error = close("forward", ours(), theirs().permute(0, 2, 3, 1), 1e-4)
        return {"error": error} | alternate({"jdiff": ours, "torch": theirs}, args.rounds, calls=3)


def _dit_train(args: argparse.Namespace, model: Any, params: Any, data: tuple[np.ndarray, ...]) -> Row:
    """Forward, backward, AdamW and the average, with fresh t and noise a step on both sides."""
    import torch

    lr, ema = 1e-4, optim.Ema(0.9999)
    schedule = diffusion.make_schedule("linear")
    tx = optim.make_optimizer(optim.make_schedule("constant", lr, 0, 1))
    gradient = mean_gradient(class_loss(model, Process(schedule, variance="learned_range")))
    mesh = sharding.make_mesh()
    batch = sharding.put_batch(mesh, {"latent": data[0], "label": data[3]})
    # copies: the step takes its state's memory
    state = train.make_state({"dit": jax.tree.map(jnp.array, params)}, tx, f"dit/({model.frozen})")
    placed = sharding.shardings(mesh, state)
    step, held = train.jitted_step(mesh, placed, gradient, tx=tx, ema=ema, seed=0), [jax.device_put(state, placed)]

    def ours():
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    if args.side == "jdiff":
        return alone(ours)
    peer = torch_dit(model, params)
    peer_average = copy.deepcopy(peer)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=lr, weight_decay=0.0, fused=True)
    peer_loss = torch_loss(schedule, peer)
    peer_data = (_nchw(data[0]), torch.tensor(data[1]).long(), _nchw(data[2]), torch.tensor(data[3]).long())
    averaged, trained = list(peer_average.parameters()), list(peer.parameters())

    def theirs():
        times = torch.randint(0, 1000, (len(data[0]),))
        optimizer.zero_grad()
        loss = peer_loss(peer_data[0], times, torch.randn_like(peer_data[0]), peer_data[3])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, trained, 1 - ema.decay)
        return loss.item()

    if args.side == "torch":
        return alone(theirs)

    def fixed_loss(params, x_0, t, noise, y):
        denoise = lambda x, t: model.apply({"params": params}, x, t, y)  # noqa: E731
        return diffusion.gaussian_loss(denoise, schedule, x_0, t, noise)["loss"].mean()

    loss, grads = jax.jit(jax.value_and_grad(fixed_loss))(params, *map(jnp.asarray, data))
    expected = peer_loss(*peer_data)
    expected.backward()
    error = close("loss", loss, expected.detach(), 1e-4)
    # positions have no gradient in the peer, and must be the fixed ones in its names
    found = convert.to_torch(model, {**grads, "pos_embed": params["pos_embed"]})
    for name, parameter in peer.named_parameters():
        if not name.endswith("to_k.bias"):  # softmax makes its gradient exactly zero
            error = max(error, close(f"gradient of {name}", found[name], parameter.grad, 2e-4))
    return {"error": error} | alternate({"jdiff": ours, "torch": theirs}, args.rounds)


def _dit_ddim(args: argparse.Namespace, model: Any, params: Any, data: tuple[np.ndarray, ...]) -> Row:
    import torch
    from diffusers import DDIMScheduler

    scale, steps = 4.0, args.steps
    schedule = diffusion.make_schedule("linear")
    respaced = diffusion.respace(schedule, steps, "leading")

    @jax.jit
    def sample(params, x_T, y):
        denoise = lambda x, t, y: model.apply({"params": params}, x, t, y)  # noqa: E731
        return diffusion.ddim(diffusion.guide(denoise, y, model.null_label, scale), respaced, x_T, steps=None)

    weights, (x_T, y) = over_devices(params, data[2], data[3])
    ours = lambda: sample(weights, x_T, y).block_until_ready()  # noqa: E731
    if args.side == "jdiff":
        return alone(ours)
    peer = torch_dit(model, params)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(steps)
    peer_x, labels = _nchw(data[2]), torch.tensor(data[3]).long()
    both = torch.cat([labels, torch.full_like(labels, model.null_label)])

    @torch.inference_mode()
    def theirs():
        x = peer_x
        for t in scheduler.timesteps:
            eps = peer(torch.cat([x, x]), t.expand(len(both)), both, return_dict=False)[0][:, : model.channels]
            cond, uncond = eps.chunk(2)
            x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
        return x

    if args.side == "torch":
        return alone(theirs)
    error = close("samples", ours(), theirs().permute(0, 2, 3, 1), 1e-3)
    return {"error": error} | alternate({"jdiff": ours, "torch": theirs}, max(args.rounds // 2, 3))
