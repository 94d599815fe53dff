"""Speed of jdiff beside its peer, measured so that the ratio can be believed.

    python tools/bench.py dit [--batch 8] [--rounds 9] [--only train] [--memory] [--json FILE]
    python tools/bench.py data [--source imagefolder --path FOLDER] [--batch 64] [--step-ms 100]

Each case makes both sides from one set of random weights, asserts that they compute the same, warms both up, and then runs
them in turn (A B A B ...), so that whatever else the machine does falls on both. One JSON line a case gives medians and
minima in milliseconds and their ratios jdiff / peer: below 1 jdiff is the quicker. The peer on a CPU is PyTorch in eager
mode with diffusers' own modules, schedulers and the fused AdamW. `others` is the share of the machine's processors that
went to other processes meanwhile: above 0.05 the figures are no measurement, and a line says so.

A case is a generator of rows, registered in `CASES`.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import data as pipeline
from jdiff import diffusion, optim, runtime, train, tree
from jdiff.diffusion.process import Process

Row = dict[str, Any]
PAUSE = 0.05
"""Seconds between the two sides: the worker threads of both spin for some milliseconds after their last task."""


class Busy:
    """What other processes take of this machine's processors, from the time of its making."""

    def __init__(self):
        self.start = self._now()

    def _now(self) -> np.ndarray:
        """Seconds of processor time since boot: available, used, used by this process."""
        if not os.path.exists("/proc/stat"):
            return np.full(3, np.nan)
        with open("/proc/stat") as file:
            ticks = np.array([int(x) for x in file.readline().split()[1:9]]) / os.sysconf("SC_CLK_TCK")
        return np.array([ticks.sum(), ticks.sum() - ticks[3:5].sum(), sum(os.times()[:2])])

    def others(self) -> float:
        """Their share, 0 to 1; nan where the system does not say."""
        available, used, own = self._now() - self.start
        return round(max(float((used - own) / available), 0.0), 3)


def alternate(sides: dict[str, Callable[[], Any]], rounds: int, calls: int = 1) -> Row:
    """Milliseconds a call of each side, taken in turn after one warm-up round, and ratios of the first to the second."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    busy = Busy()
    for round_ in range(rounds + 1):
        for name, function in sides.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if round_:
                times[name].append((time.perf_counter() - start) / calls * 1e3)
    row: Row = {}
    for name, values in times.items():
        row |= {f"{name}_ms": round(statistics.median(values), 2), f"{name}_min_ms": round(min(values), 2)}
    a, b = sides
    row["others"] = busy.others()
    row["ratio"] = round(row[f"{a}_ms"] / row[f"{b}_ms"], 3)
    row["ratio_min"] = round(row[f"{a}_min_ms"] / row[f"{b}_min_ms"], 3)
    return row


def close(name: str, found: Any, expected: Any, tolerance: float) -> float:
    """The largest difference relative to the largest expected magnitude; an error above the tolerance."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = float(np.max(np.abs(found - expected)) / max(float(np.max(np.abs(expected))), 1e-30))
    if not error <= tolerance:
        raise AssertionError(f"{name}: the two sides differ by {error:.1e}, more than {tolerance:.0e}")
    return error


# --- DiT ------------------------------------------------------------------------------------------------------------


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


def torch_names(params: Any) -> dict[str, np.ndarray]:
    """A DiT's tree (of weights or gradients) under diffusers' names and layouts, blocks' embedders once, under block 0."""
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    out: dict[str, np.ndarray] = {"pos_embed.pos_embed": flat["pos_embed"]}

    def linear(name: str, kernel: np.ndarray, bias: np.ndarray) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = kernel.T, bias

    out["pos_embed.proj.weight"] = flat["x_embedder/kernel"].transpose(3, 2, 0, 1)
    out["pos_embed.proj.bias"] = flat["x_embedder/bias"]
    emb = "transformer_blocks.0.norm1.emb"
    for i, ours in enumerate(("mlp_0", "mlp_2"), start=1):
        linear(f"{emb}.timestep_embedder.linear_{i}", *(flat[f"t_embedder/{ours}/{x}"] for x in ("kernel", "bias")))
    out[f"{emb}.class_embedder.embedding_table.weight"] = flat["y_embedder/embedding"]
    for ours, theirs in (("final_adaLN_modulation", "proj_out_1"), ("final_linear", "proj_out_2")):
        linear(theirs, flat[f"{ours}/kernel"], flat[f"{ours}/bias"])
    for i in range(len(flat["adaLN_modulation/kernel"])):
        block = f"transformer_blocks.{i}"
        linear(f"{block}.norm1.linear", flat["adaLN_modulation/kernel"][i], flat["adaLN_modulation/bias"][i])
        kernels, biases = (np.split(flat[f"blocks/attn/qkv/{x}"][i], 3, -1) for x in ("kernel", "bias"))
        for part, kernel, bias in zip("qkv", kernels, biases, strict=True):
            linear(f"{block}.attn1.to_{part}", kernel, bias)
        names = {"attn/proj": "attn1.to_out.0", "mlp/fc1": "ff.net.0.proj", "mlp/fc2": "ff.net.2"}
        for ours, theirs in names.items():
            linear(f"{block}.{theirs}", flat[f"blocks/{ours}/kernel"][i], flat[f"blocks/{ours}/bias"][i])
    return out


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
    weights = {name: torch.tensor(value) for name, value in torch_names(params).items()}
    peer.pos_embed.pos_embed.copy_(weights.pop("pos_embed.pos_embed"))
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    missing = [name for name in missing if ".norm1.emb." not in name]
    assert not missing and not unexpected, (missing, unexpected)
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
    inputs = tuple(map(jnp.asarray, (x, t, y)))
    ours = lambda: forward(params, *inputs).block_until_ready()  # noqa: E731
    if args.side == "jdiff":
        return _alone(ours)
    peer = torch_dit(model, params)
    peer_inputs = (_nchw(x), torch.tensor(t), torch.tensor(y))
    with torch.inference_mode():
        theirs = lambda: peer(*peer_inputs, return_dict=False)[0]  # noqa: E731
        if args.side == "torch":
            return _alone(theirs)
        error = close("forward", ours(), theirs().permute(0, 2, 3, 1), 1e-4)
        return {"error": error} | alternate({"jdiff": ours, "torch": theirs}, args.rounds, calls=3)


def _dit_train(args: argparse.Namespace, model: Any, params: Any, data: tuple[np.ndarray, ...]) -> Row:
    """Forward, backward, AdamW and the average, with fresh t and noise a step on both sides."""
    import torch

    lr, ema = 1e-4, optim.Ema(0.9999)
    schedule = diffusion.make_schedule("linear")
    tx = optim.make_optimizer(optim.make_schedule("constant", lr, 0, 1))
    loss_fn = train.class_loss(model, Process(schedule, variance="learned_range"))

    def one_step(state, batch):
        return train.train_step(state, batch, loss_fn=loss_fn, tx=tx, ema=ema, seed=0)

    step = jax.jit(one_step, donate_argnums=0)
    batch = {"latent": jnp.asarray(data[0]), "label": jnp.asarray(data[3])}
    held = [train.init_state(model, tx, jax.random.key(0))]

    def ours():
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    if args.side == "jdiff":
        return _alone(ours)
    peer = torch_dit(model, params)
    average = copy.deepcopy(peer)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=lr, weight_decay=0.0, fused=True)
    peer_loss = torch_loss(schedule, peer)
    peer_data = (_nchw(data[0]), torch.tensor(data[1]).long(), _nchw(data[2]), torch.tensor(data[3]).long())
    averaged, trained = list(average.parameters()), list(peer.parameters())

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
        return _alone(theirs)

    def fixed_loss(params, x_0, t, noise, y):
        denoise = lambda x, t: model.apply({"params": params}, x, t, y)  # noqa: E731
        return diffusion.gaussian_loss(denoise, schedule, x_0, t, noise)["loss"].mean()

    loss, grads = jax.jit(jax.value_and_grad(fixed_loss))(params, *map(jnp.asarray, data))
    expected = peer_loss(*peer_data)
    expected.backward()
    error = close("loss", loss, expected.detach(), 1e-4)
    gradients = dict(peer.named_parameters())
    for name, value in torch_names(grads).items():
        if name != "pos_embed.pos_embed" and not name.endswith("to_k.bias"):  # softmax makes the latter's exactly zero
            error = max(error, close(f"gradient of {name}", value, gradients[name].grad, 2e-4))
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

    x_T, y = jnp.asarray(data[2]), jnp.asarray(data[3])
    ours = lambda: sample(params, x_T, y).block_until_ready()  # noqa: E731
    if args.side == "jdiff":
        return _alone(ours)
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
        return _alone(theirs)
    error = close("samples", ours(), theirs().permute(0, 2, 3, 1), 1e-3)
    return {"error": error} | alternate({"jdiff": ours, "torch": theirs}, max(args.rounds // 2, 3))


# --- the input pipeline ---------------------------------------------------------------------------------------------


def data(args: argparse.Namespace) -> Iterator[Row]:
    """Images a second of a source alone, and the share of a step of `--step-ms` that waits for its batch."""
    source = pipeline.open_source(args.source, path=args.path, image_size=args.image_size)
    settings = {"batch_size": args.batch, "seed": 0, "workers": args.workers}
    reader = pipeline.batches(source, **settings)
    next(reader)
    busy, start = Busy(), time.perf_counter()
    for _ in range(args.rounds):
        next(reader)
    rate = args.rounds * args.batch / (time.perf_counter() - start)
    device = pipeline.to_device(pipeline.batches(source, **settings), jax.device_put)
    next(device)
    before, start = device.wait_seconds, time.perf_counter()
    for _ in range(args.rounds):
        next(device)
        time.sleep(args.step_ms / 1e3)  # stands for a step on an accelerator, which leaves the processors free
    waits = (device.wait_seconds - before) / (time.perf_counter() - start)
    yield {
        "case": f"data {args.source} {args.image_size}px b{args.batch} workers {args.workers}",
        "images_per_s": round(rate, 1),
        "step_ms": args.step_ms,
        "waits": round(waits, 4),
        "others": busy.others(),
    }


# --- running --------------------------------------------------------------------------------------------------------


def _alone(function: Callable[[], Any]) -> Row:
    """A few calls of one side, in a process of its own, for its peak memory."""
    for _ in range(3):
        function()
    return {"rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def _memory(row: Row) -> Row:
    """Peak resident memory of each side, each in a process that runs it alone. Both have loaded both libraries."""
    only = row["case"].split()[1]
    for side in ("jdiff", "torch"):
        command = [sys.executable, *sys.argv, "--only", only, "--side", side]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        row[f"{side}_rss_mib"] = next(json.loads(x)["rss_mib"] for x in lines if "rss_mib" in x)
    return row


def machine() -> Row:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((x.split(":")[1].strip() for x in file if x.startswith("model name")), model)
    libraries = ("jax", "jaxlib", "flax", "torch", "diffusers")
    return {
        "device": str(jax.devices()[0].device_kind),
        "processor": f"{os.cpu_count()} x {model}",
        "load": round(os.getloadavg()[0], 2),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


def report(rows: list[Row]) -> None:
    """The rows as a small table."""
    known = ("jdiff_ms", "torch_ms", "ratio", "ratio_min", "images_per_s", "waits", "others")
    columns = [key for key in known if any(key in row for row in rows)]
    print(" | ".join(["case".ljust(28), *(key.rjust(9) for key in columns)]))
    for row in rows:
        print(" | ".join([row["case"].ljust(28), *(str(row.get(key, "")).rjust(9) for key in columns)]))
    if any(row.get("others", 0) > 0.05 for row in rows):
        print("other processes took more than 5 % of the machine: measure again when it is quiet", file=sys.stderr)


CASES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {"dit": dit, "data": data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="append the lines to this file")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each side in its own process")
    parser.add_argument("--only", default="", help="dit: some of forward,train,ddim")
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--steps", type=int, default=10, help="dit: DDIM steps")
    parser.add_argument("--source", default="openmoji")
    parser.add_argument("--path", help="data: the source's folder")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    runtime.prepare()
    rows = []
    lines = [machine()] if not args.side else []
    for line in lines:
        print(json.dumps(line), flush=True)
    for row in CASES[args.case](args):
        rows.append(_memory(row) if args.memory and not args.side else row)
        lines.append(rows[-1])
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        with open(args.json, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    if not args.side:
        report(rows)


if __name__ == "__main__":
    main()
