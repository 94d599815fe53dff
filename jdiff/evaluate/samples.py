"""What is scored: pictures that lie somewhere, what a pipeline of classes samples, or what an autoencoder makes of a reference."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from jdiff import checkpoint, sharding, tree
from jdiff.evaluate.pictures import Pictures, batches, open_pictures
from jdiff.evaluate.reconstruction import reconstructions
from jdiff.loading import load_run, pipeline
from jdiff.pipelines import ClassPipeline


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is scored. size: of its pictures, in pixels; facts: how they are made, for the line of scores; identity: what tells
    them from others beside the facts. One of three makes them:

    made: the pictures from the n-th on, uint8 (B, H, W, 3) each, in the same batches whenever it is asked; with pictures, where
    these lie somewhere. remake: batches of originals -> what a run makes of them.
    """

    size: int
    facts: dict[str, Any]
    identity: dict[str, Any]
    made: Callable[[int], Iterator[np.ndarray]] | None = None
    remake: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]] | None = None
    pictures: Pictures | None = None


def of_pictures(source: str, image_size: int | None, most: int | None, captions: bool = False) -> Samples:
    """Those of `open_pictures`, at most so many. ValueError where they may be read at any size, and none is given."""
    if image_size is None and not source.endswith(".npz"):
        raise ValueError(f"--image-size is missing: {source} may be read at any")
    pictures = open_pictures(source, image_size or 0, captions)
    identity = {"pictures": pictures.fingerprint, "shape": pictures.shape, "num": most}
    made = partial(batches, pictures, most)
    return Samples(pictures.shape[1], {}, identity, made, pictures=pictures)


def of_pipeline(
    pipe: ClassPipeline, count: int, batch_size: int, *, params: Any = None, sampler: str | None = None, **settings: Any
) -> Samples:
    """So many pictures of a pipeline, its labels in turn. params: other parameters than its own. settings: `steps`,
    `guidance_scale` and `seed` of its call.

    ValueError where it makes latents.
    """
    if pipe.model.channels != 3:
        raise ValueError("a model of latents makes no pictures to score: decode them, and score those")
    labels, sampler = [i % pipe.model.num_classes for i in range(count)], sampler or pipe.sampler

    def made(first: int) -> Iterator[np.ndarray]:
        with tqdm(total=count, initial=first, unit="image", desc="samples", leave=False) as bar:
            for pictures in pipe.many(labels, batch_size, first, params=params, sampler=sampler, **settings):
                yield pictures
                bar.update(len(pictures))

    facts = {"sampler": sampler, "sampling_steps": settings["steps"], "guidance": settings["guidance_scale"]}
    identity = {"count": count, "batch_size": batch_size, "seed": settings["seed"]}
    return Samples(pipe.model.image_size, facts, identity, made)


def of_run(
    workdir: Path,
    *,
    count: int,
    batch_size: int,
    steps: int,
    guidance: float,
    seed: int,
    weights: Literal["ema", "raw"] = "ema",
    step: int | None = None,
    image_size: int | None = None,
) -> Samples:
    """A training run of classes, sampled, or of an autoencoder, which remakes pictures. step: its checkpoint, the newest when None.

    image_size: of an autoencoder's pictures, its own when None. ValueError for a run of another task, or of latents.
    """
    step = max(checkpoint.steps(workdir), default=None) if step is None else step
    facts = {"step": step, "weights": weights}
    if step is not None and checkpoint.read_meta(workdir, step)["main"] == "vae":
        found, meta = load_run(workdir, weights=weights, step=step)
        vae, config = found["vae"], meta["config"]
        at_once = max(1, config["batch_size"] // config["accumulate"] // sharding.make_mesh().size)
        remake = lambda originals: reconstructions(*vae, originals, at_once)  # noqa: E731
        size = image_size or config["data"]["image_size"]
        return Samples(size, facts, {"params": tree.fingerprint(vae[1])}, remake=remake)
    pipe = pipeline(workdir, weights=weights, step=step)
    if not isinstance(pipe, ClassPipeline):
        raise ValueError(f"{workdir} takes prompts: make pictures with tools/sample.py --npz, and score those")
    if image_size not in (None, pipe.model.image_size):
        raise ValueError(f"--image-size={image_size}: {workdir} makes pictures of {pipe.model.image_size}")
    samples = of_pipeline(pipe, count, batch_size, steps=steps, guidance_scale=guidance, seed=seed)
    identity = {**samples.identity, "params": tree.fingerprint(pipe.params)}
    return dataclasses.replace(samples, facts={**facts, **samples.facts}, identity=identity)
