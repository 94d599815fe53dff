"""Pictures from a trained run or a folder in diffusers' layout.

    python tools/sample.py runs/a --labels 1,5,7 --steps 50 --guidance 4 --seed 0 --out grid.png
    python tools/sample.py runs/a --num 50000 --guidance 1.5 --npz samples.npz      # uint8 (N, H, W, 3) and labels
    python tools/sample.py sd15/ --prompt "a (red:1.3) fox" --negative "blurry" --scheduler euler --num 4
    python tools/sample.py sd15/ --prompt "a fox" --lora style.safetensors:0.8 --lora runs/003-sd15_lora
    python tools/sample.py sd15/ --prompt "a fox" --image photo.png --strength 0.6 --size 512x768 --out fox.png
    python tools/sample.py sd15/ --prompt "a fox" --image photo.png --mask mask.png   # white is made anew

With --npz each batch is kept in FILE.npz.parts until all are made: the same command goes on where it was ended. Several processes,
and all their devices, share the work (docs/scale.md).

With --num the labels go round through all classes (or through --labels), and so do several prompts. Picture i depends on the
seed, i and its label or prompts alone: not on the batch size or the number of devices. A model of labels in latents shows
previews at the latents' resolution.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from jdiff import command

if TYPE_CHECKING:
    from jdiff.processes import Peers

BY_LABELS = ("labels", "sampler", "guidance_channels", "guidance_interval")
BY_PROMPTS = ("prompt", "negative", "image", "mask", "strength", "scheduler", "size", "clip_skip")
"""Options that one kind of model has and the other has not."""
PLACES = ("out", "npz", "png_dir", "coordinator", "processes", "process", "start_limit", "lost_after")
"""Options in which the processes of one command may differ."""


def parse_labels(text: str, names: list[str], num_classes: int) -> list[int]:
    """`1,5,animals` -> class ids, by number or by name; ValueError for one that the run does not have."""
    from jdiff.tree import nearest

    lower = [name.lower() for name in names]
    labels = []
    for word in (w.strip() for w in text.split(",")):
        if word.isdecimal() and int(word) < num_classes:
            labels.append(int(word))
        elif word.lower() in lower:
            labels.append(lower.index(word.lower()))
        else:
            listed = f"; the classes are {dict(enumerate(names))}" if len(names) <= 20 else nearest(word, names)
            raise ValueError(
                f"--labels: the run has no class {word!r}; give numbers 0..{num_classes - 1} or names{listed}"
            )
    return labels


def parse_size(text: str) -> tuple[int, int]:
    """`512` or `512x768` (height x width) -> (height, width)."""
    words = text.lower().split("x")
    if len(words) > 2 or not all(word.isdecimal() for word in words):
        raise ValueError(f"--size={text}: give a number, or HEIGHTxWIDTH")
    return int(words[0]), int(words[-1])


def main() -> int:
    """Parses, samples in batches, writes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a training run's folder, or one with a model_index.json")
    parser.add_argument("--num", type=int, help="how many pictures; labels or prompts go round")
    parser.add_argument("--steps", type=int, default=50, help="sampler steps")
    parser.add_argument(
        "--guidance", type=float, help="classifier-free guidance scale; 1 is none (4 by label, 7.5 by prompt)"
    )
    parser.add_argument("--guidance-rescale", type=float, default=0.0, help="phi of arXiv:2305.08891")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, help="pictures made at once (64 by label, 4 by prompt)")
    parser.add_argument(
        "--lora", action="append", default=[], help="FILE or FILE:SCALE of peft, diffusers, kohya or a run; repeatable"
    )
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a run")
    parser.add_argument("--step", type=int, help="a run's checkpoint (default: the newest)")
    parser.add_argument(
        "--out", type=Path, help="one PNG, a grid of several (default: grid.png, unless --npz or --png-dir)"
    )
    parser.add_argument("--npz", type=Path, help="all pictures as arr_0, uint8, with their labels or prompts")
    parser.add_argument("--png-dir", type=Path, help="a folder for one PNG a picture")
    labels = parser.add_argument_group("by label")
    labels.add_argument("--labels", help="class numbers or names, by comma (default: all classes, 16 at most)")
    labels.add_argument("--sampler", help="ddpm, ddim; euler, heun for a flow-matching run")
    labels.add_argument("--guidance-channels", type=int, help="3 guides as the official DiT sampler; all when left out")
    labels.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels in 0..1"
    )
    prompts = parser.add_argument_group("by prompt")
    prompts.add_argument(
        "--prompt", action="append", help="what to show, (weighted:1.3) where wanted; may be given again"
    )
    prompts.add_argument("--negative", help="what to lead away from")
    prompts.add_argument("--image", type=Path, help="a picture to begin with; the result has its size")
    prompts.add_argument("--mask", type=Path, help="of --image: white is made anew")
    prompts.add_argument("--strength", type=float, help="how much of --image is made anew (0.8; 1 with --mask)")
    prompts.add_argument("--scheduler", help="another than the model's own: euler, dpmpp_2m, unipc, ...")
    prompts.add_argument("--size", help="of the pictures, N or HEIGHTxWIDTH; --image and --mask are resized to it")
    prompts.add_argument("--clip-skip", type=int, help="how many of the text encoder's last layers to leave out")
    command.add_process_options(parser)
    return command.run("sample.py", sample, parser.parse_args())


def sample(options: argparse.Namespace) -> int:
    """The work behind `main`, as one of several processes or alone."""
    command.check_above_zero(options, ("steps", "batch_size", "num"))
    from jdiff import processes, runtime

    runtime.quiet()
    peers = processes.join(options)
    return peers.run(lambda: make(options, peers))


def make(options: argparse.Namespace, peers: "Peers") -> int:
    """Makes the pictures and writes them."""
    import jdiff
    from jdiff import runtime
    from jdiff.pipelines import TextPipeline
    from jdiff.pipelines.kept import KeptPictures
    from jdiff.pipelines.loras import split_scale
    from jdiff.tree import digest, fingerprint

    given = len(options.prompt or ()) or len((options.labels or "").split(","))
    count = min(options.batch_size or 64, max(options.num or 1, given))
    rows = count if options.guidance == 1 else 2 * count
    runtime.prepare(runtime.cpu_devices(rows, least=1, processes=peers.count))
    asked = {key: value for key, value in vars(options).items() if key not in PLACES}
    peers.agree({key: str(value) for key, value in asked.items()})
    loras = [split_scale(text) for text in options.lora]
    pipe = jdiff.pipeline(options.run, weights=options.weights, step=options.step, lora=loras)
    by_prompt = isinstance(pipe, TextPipeline)
    for name in BY_LABELS if by_prompt else BY_PROMPTS:
        if getattr(options, name) is not None:
            kind = "prompts, not labels" if by_prompt else "labels, not prompts"
            raise ValueError(f"--{name.replace('_', '-')}: the model in {options.run} takes {kind}")
    made, facts, column = (from_prompts if by_prompt else from_labels)(pipe, options)
    if options.npz is None:
        parts: Any = list(made(0))
    else:
        first = {key: value for key, value in facts[0].items() if key not in (column, "index")}
        files = {
            name: digest({"": path.read_bytes()}) for name in ("image", "mask") if (path := getattr(options, name))
        }
        identity = {
            "params": fingerprint(pipe.params),
            **first,
            "each": [fact[column] for fact in facts],
            "files": files,
        }
        parts = KeptPictures(options.npz.with_name(options.npz.name + ".parts"), identity)
        peers.agree({"pictures in the folder": parts.done})
        if parts.done and peers.index == 0:
            print(f"{parts.done} pictures are in {parts.place} already")
        for pictures_BHWC in made(parts.done):
            if peers.index == 0:
                parts.add(pictures_BHWC)
    if peers.index == 0:
        write(options, parts, facts, column)
    return 0


Made = Callable[[int], Iterator[np.ndarray]]
"""The pictures from the n-th on, uint8 (B, H, W, 3) at a time."""


def from_labels(pipe: Any, options: argparse.Namespace) -> tuple[Made, list[dict[str, Any]], str]:
    """(what makes the pictures, facts of each, which fact tells them apart) of a model of classes."""
    import jax

    classes = pipe.model.num_classes
    chosen = (
        parse_labels(options.labels, pipe.class_names, classes) if options.labels is not None else list(range(classes))
    )
    count = options.num or (len(chosen) if options.labels is not None else min(classes, 16))
    labels = [chosen[i % len(chosen)] for i in range(count)]
    settings = {
        "steps": options.steps,
        "guidance_scale": 4.0 if options.guidance is None else options.guidance,
        "guidance_channels": options.guidance_channels,
        "guidance_rescale": options.guidance_rescale,
        "guidance_interval": tuple(options.guidance_interval) if options.guidance_interval else None,
        "sampler": options.sampler,
        "seed": options.seed,
    }

    def made(first: int) -> Iterator[np.ndarray]:
        with tqdm(total=count, initial=first, unit="image", disable=jax.process_index() != 0) as bar:
            for pictures in pipe.many(labels, options.batch_size or 64, first, **settings):
                yield pictures
                bar.update(len(pictures))

    return made, [{"labels": labels[i], "index": i, **settings} for i in range(count)], "labels"


def from_prompts(pipe: Any, options: argparse.Namespace) -> tuple[Made, list[dict[str, Any]], str]:
    """(what makes the pictures, facts of each, which fact tells them apart) of a model of texts."""
    import jax

    if not options.prompt:
        raise ValueError(f'--prompt: the model in {options.run} takes texts; give one, as in --prompt "a red fox"')
    count = options.num or len(options.prompt)
    prompts = [options.prompt[i % len(options.prompt)] for i in range(count)]
    batch = min(options.batch_size or 4, count)
    size = parse_size(options.size) if options.size else None
    settings: dict[str, Any] = {
        "negative_prompt": options.negative or "",
        "strength": options.strength,
        "steps": options.steps,
        "guidance_scale": 7.5 if options.guidance is None else options.guidance,
        "guidance_rescale": options.guidance_rescale,
        "scheduler": options.scheduler,
        "seed": options.seed,
        "clip_skip": options.clip_skip,
        "image": options.image and open_picture(options.image, size, Image.Resampling.LANCZOS),
        "mask": options.mask and open_picture(options.mask, size, Image.Resampling.NEAREST),
    }
    if size:
        settings |= {"height": size[0], "width": size[1]}
    files = {name: str(path) for name in ("image", "mask") if (path := getattr(options, name))}
    facts = [{**fact, **files} for fact in pipe.facts(prompts, **settings)]

    def made(begin: int) -> Iterator[np.ndarray]:
        batches = math.ceil((count - begin) / batch)
        with tqdm(unit="call", disable=jax.process_index() != 0) as bar:
            for number, first in enumerate(range(begin, count, batch)):
                rows = [prompts[min(first + i, count - 1)] for i in range(batch)]

                def tell(done: int, total: int, _: Any, before: int = number) -> None:
                    bar.total = total * batches
                    bar.update(before * total + done - bar.n)

                pictures = pipe(rows, first_index=first, callback=tell, **settings)[: count - first]
                yield np.stack([np.asarray(picture) for picture in pictures])

    return made, facts, "prompt"


def open_picture(path: Path, size: tuple[int, int] | None, resampling: Image.Resampling) -> Image.Image:
    """A picture file, upright, of (height, width) where that is given."""
    from jdiff.data.images import bounded

    with Image.open(bounded(path)) as image:
        image = ImageOps.exif_transpose(image)
        image.load()
        return image.resize((size[1], size[0]), resampling) if size else image


def write(options: argparse.Namespace, parts: Any, facts: list[dict[str, Any]], column: str) -> None:
    """Puts pictures, which come in parts, and their facts where the options say."""
    from jdiff import pipelines
    from jdiff.pipelines.kept import write_npz

    count, run = len(facts), {"run": str(options.run)}
    each = [fact[column] for fact in facts]
    if options.png_dir:
        width = max(5, math.ceil(math.log10(count + 1)))
        for i, picture in enumerate(picture for part in parts for picture in part):
            pipelines.save_png(Image.fromarray(picture), options.png_dir / f"{i:0{width}d}.png", {**run, **facts[i]})
        print(f"{count} pictures: {options.png_dir}")
    out = options.out or (None if options.npz or options.png_dir else Path("grid.png"))
    if out and column == "prompt" and count == 1:
        pipelines.save_png(Image.fromarray(next(iter(parts))[0]), out, {**run, **facts[0]})
        print(f"picture: {out}")
    elif out:
        shared = {key: value for key, value in facts[0].items() if key not in (column, "index")}
        pipelines.save_png(pipelines.grid(np.concatenate(list(parts))), out, {**run, column: each, **shared})
        print(f"sample grid: {out}")
    if options.npz:
        write_npz(options.npz, parts, count, {column: np.asarray(each, np.int32 if column == "labels" else None)})
        parts.remove()
        print(f"{count} pictures: {options.npz}")


if __name__ == "__main__":
    sys.exit(main())
