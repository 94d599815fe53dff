"""Pictures from a trained run.

    python tools/sample.py runs/a --labels 1,5,7 --steps 50 --guidance 4 --seed 0 --out grid.png
    python tools/sample.py runs/a --num 50000 --guidance 1.5 --npz samples.npz      # uint8 (N, H, W, 3) and labels
    python tools/sample.py runs/a --num 1000 --png-dir pictures/

With --num the labels go round through all classes (or through --labels). Picture i depends on the seed, i and its label
alone: not on the batch size or the number of devices. A latent model's pictures are previews at the latents' resolution.
"""

import argparse
import logging
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm


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


def main() -> int:
    """Parses, samples in batches, writes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a training run's folder")
    parser.add_argument("--labels", help="class numbers or names, by comma (default: all classes, 16 at most)")
    parser.add_argument("--num", type=int, help="how many pictures; the labels go round")
    parser.add_argument("--steps", type=int, default=50, help="sampler steps")
    parser.add_argument("--sampler", help="ddpm, ddim; euler, heun for a flow-matching run")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance scale; 1 is none")
    parser.add_argument("--guidance-channels", type=int, help="3 guides as the official DiT sampler; all when left out")
    parser.add_argument("--guidance-rescale", type=float, default=0.0, help="phi of arXiv:2305.08891")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels in 0..1"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the newest)")
    parser.add_argument(
        "--out", type=Path, help="a grid as one PNG (default: grid.png, unless --npz or --png-dir is given)"
    )
    parser.add_argument("--npz", type=Path, help="all pictures as arr_0, uint8, and their labels")
    parser.add_argument("--png-dir", type=Path, help="a folder for one PNG a picture")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return sample(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2


def sample(options: argparse.Namespace) -> int:
    """The work behind `main`."""
    for name in ("steps", "batch_size", "num"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be above 0")
    import jax
    from PIL import Image

    import jdiff
    from jdiff import pipelines, runtime

    runtime.prepare()
    pipe = jdiff.pipeline(options.run, weights=options.weights, step=options.step)
    classes = pipe.model.num_classes
    chosen = (
        parse_labels(options.labels, pipe.class_names, classes) if options.labels is not None else list(range(classes))
    )
    count = options.num or (len(chosen) if options.labels is not None else min(classes, 16))
    labels = [chosen[i % len(chosen)] for i in range(count)]
    batch = min(options.batch_size, count)
    out = options.out or (None if options.npz or options.png_dir else Path("grid.png"))
    settings = {
        "steps": options.steps,
        "guidance_scale": options.guidance,
        "guidance_channels": options.guidance_channels,
        "guidance_rescale": options.guidance_rescale,
        "guidance_interval": tuple(options.guidance_interval) if options.guidance_interval else None,
        "sampler": options.sampler,
        "seed": options.seed,
    }
    pictures = []
    with tqdm(total=count, unit="image", disable=jax.process_index() != 0) as bar:
        for first in range(0, count, batch):
            # the last batch is filled up to the others' size, so that it does not compile anew
            rows = [labels[min(first + i, count - 1)] for i in range(batch)]
            made = pipe.pictures(pipe(rows, first_index=first, **settings))[: count - first]
            pictures.append(made)
            bar.update(len(made))
    pictures_BHWC = np.concatenate(pictures)
    if jax.process_index() != 0:
        return 0
    facts = {"run": str(options.run), "labels": labels, **settings}
    if options.npz:
        options.npz.parent.mkdir(parents=True, exist_ok=True)
        np.savez(options.npz, arr_0=pictures_BHWC, labels=np.asarray(labels, np.int32))
        print(f"{count} pictures: {options.npz}")
    if options.png_dir:
        width = max(5, math.ceil(math.log10(count + 1)))
        for i, picture in enumerate(pictures_BHWC):
            path = options.png_dir / f"{i:0{width}d}.png"
            pipelines.save_png(Image.fromarray(picture), path, {**facts, "labels": labels[i], "index": i})
        print(f"{count} pictures: {options.png_dir}")
    if out:
        pipelines.save_png(pipelines.grid(pictures_BHWC), out, facts)
        print(f"sample grid: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
