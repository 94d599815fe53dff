"""What is disturbed: each kind of command at the size of a second, and all that an undisturbed one leaves."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import TINY, make_pictures

from jdiff import checkpoint
from jdiff.report import SPEED

Arguments = Callable[[Path, Path], list[object]]
STEPS = 24


@dataclasses.dataclass(frozen=True)
class Case:
    """A script and its arguments, given the `stock` of what other cases have made and the place to write to.

    trains: whether it leaves a run, whose checkpoints and records count, and not its files byte by byte.
    """

    script: str
    arguments: Arguments
    trains: bool = False


def _train(config: str, keys: Callable[[Path], dict[str, object]], every: int = 3) -> Case:
    def arguments(stock: Path, place: Path) -> list[object]:
        cadence = {"total_steps": STEPS, "checkpoint_every": every, "sample_every": STEPS // 4, "log_every": 1}
        values = {**cadence, "log.tensorboard": "false", "data.name": "imagefolder", "data.path": stock / "pictures"}
        flags = [f"--config.{key}={value}" for key, value in {**values, **keys(stock)}.items()]
        return ["--config", f"configs/{config}.py", "--workdir", place, *flags]

    return Case("launch.py", arguments, trains=True)


def _tool(name: str, arguments: Arguments) -> Case:
    return Case(f"tools/{name}.py", arguments)


DIT = dict(flag.removeprefix("--config.").split("=") for flag in TINY) | {"optim.lr": 1e-3, "data.workers": 0}
CLASSIFIER = {"data.image_size": 16, "model.widths": "8,16", "batch_size": 8, "data.split": "all", "data.workers": 0}
VAE = {
    **{"vae.block_out_channels": "8,16", "vae.layers_per_block": 1, "vae.norm_num_groups": 4, "batch_size": 8},
    **{
        "gan.width": 4,
        "gan.start": 2,
        "data.image_size": 32,
        "data.split": "all",
        "heldout.count": 4,
        "sample.count": 4,
    },
    **{"optim.schedule": "constant", "data.workers": 0},
}
TEXT = {
    **{"data.name": "captions", "data.only": "none", "data.image_size": 16, "batch_size": 8, "data.workers": 0},
    **{
        "unet.block_out_channels": "8,16",
        "unet.attention": "false,true",
        "unet.heads": "2,2",
        "unet.norm_num_groups": 4,
    },
    **{
        "text.vocab_size": 530,
        "text.width": 16,
        "text.hidden": 32,
        "text.layers": 1,
        "text.heads": 2,
        "text.max_length": 8,
    },
    **{"sample.steps": 2, "sample.prompts": "a red fox", "optim.lr": 1e-3},
}
CASES = {
    "train DiT": _train("dit_s2", lambda stock: DIT),
    "train classifier": _train("classifier_openmoji", lambda stock: CLASSIFIER),
    "train VAE": _train("vae_openmoji", lambda stock: {**VAE, "heldout.path": stock / "pictures"}),
    "train SD": _train(
        "sd_openmoji", lambda stock: {**TEXT, "data.path": stock / "captions", "vae.path": stock / "train VAE"}, every=6
    ),
    "train LoRA": _train(
        "dit_s2", lambda stock: {**DIT, "init_from": stock / "train DiT", "lora.rank": 2, "lora.targets": "attn"}
    ),
    "sample": _tool(
        "sample",
        lambda stock, place: [
            *(stock / "train DiT", "--num", 24, "--batch-size", 2, "--steps", 4, "--guidance", 1.5),
            *("--npz", place / "all.npz", "--png-dir", place / "each"),
        ],
    ),
    "evaluate": _tool(
        "evaluate",
        lambda stock, place: [
            *(stock / "train DiT", "--network", stock / "train classifier", "--reference", stock / "pictures"),
            *("--metrics", "fid,kid", "--resamples", 2, "--num", 48, "--batch-size", 4, "--steps", 4),
            *("--features", place / "features", "--json", place / "scores.jsonl"),
        ],
    ),
    "convert": _tool(
        "convert", lambda stock, place: [stock / "train SD", place / "sd", "--to", "diffusers", "--dtype", "fp16"]
    ),
    "quantize": _tool("quantize", lambda stock, place: [stock / "train DiT", place / "small", "--recipe", "w8a8"]),
    "cache": _tool(
        "cache_latents",
        lambda stock, place: [
            *(stock / "pictures", place / "cache", "--vae", stock / "train VAE", "--image-size", 16),
            *("--batch-size", 2, "--shard-size", 4),
        ],
    ),
}
"""In an order in which each finds what it needs."""


NEEDS = {
    **dict.fromkeys(("train LoRA", "sample", "quantize"), ("train DiT",)),
    **dict.fromkeys(("train SD", "cache"), ("train VAE",)),
    "convert": ("train SD",),
    "evaluate": ("train DiT", "train classifier"),
}
"""Case -> those that make what it takes."""


def make(run: Callable[..., None], stock: Path, name: str) -> dict[str, Any]:
    """What a case's command leaves that nothing disturbs, in `stock`, where it is made, after what it needs, unless it is there.

    run: starts a script with arguments, and raises where it fails.
    """
    for other in NEEDS.get(name, ()):
        make(run, stock, other)
    if not (stock / name).exists():
        run(CASES[name].script, *CASES[name].arguments(stock, stock / name))
    return outcome(CASES[name], stock / name)


def stock_in(folder: Path) -> Path:
    """A session's stock: pictures of two classes and the same with captions, to begin with."""
    stock = folder / "stock"
    if stock.exists():
        return stock
    make_pictures(stock / "pictures")
    shutil.copytree(stock / "pictures" / "ant", stock / "captions")
    for i, path in enumerate(sorted((stock / "captions").glob("*.png"))):
        path.with_suffix(".txt").write_text(f"a red fox, number {i}")
    return stock


def files_of(place: Path) -> dict[str, bytes]:
    """The files that stand under their own names, and not beside them until they are whole."""
    unfinished = lambda name: name.startswith(".") or name.endswith((".tmp", ".parts"))  # noqa: E731
    paths = {path.relative_to(place): path for path in sorted(place.rglob("*")) if path.is_file()}
    return {str(name): p.read_bytes() for name, p in paths.items() if not any(map(unfinished, name.parts))}


def outcome(case: Case, place: Path) -> dict[str, Any]:
    """All that a finished command leaves, without what the machine's speed says."""
    if not case.trains:
        return files_of(place)
    meta = checkpoint.read_meta(place, STEPS)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return {
        **{key: meta[key] for key in ("checksums", "window", "measures", "models")},
        "records": [{k: v for k, v in line.items() if k not in SPEED} for line in lines],
        **{path.name: path.read_bytes() for path in (place / "samples").iterdir()},
        "damaged": (place / "damaged").exists(),
    }


def not_whole(case: Case, place: Path, whole: dict[str, Any]) -> list[str]:
    """Of what a killed command left, the files that stand under their own names and are not what they should become."""
    if not place.exists():
        return []
    found = {p.name: p.read_bytes() for p in (place / "samples").glob("*.png")} if case.trains else files_of(place)
    return [name for name, data in found.items() if whole.get(name) != data]
