"""Scores of pictures: FID, sFID, KID, Inception Score, precision and recall, each with an interval.

    python tools/evaluate.py runs/a --reference openmoji --network runs/classifier --num 2000
    python tools/evaluate.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz --network pt_inception.pth
    python tools/evaluate.py PICTURES --reference OTHERS --image-size 64 --network runs/classifier --metrics kid,precision

What is scored, and --reference: a folder of pictures, an .npz of them (arr_0), or openmoji[:train|heldout]; what is scored may be
a training run of classes too, whose labels go round; the reference an .npz of moments (mu, sigma). --network: the file that
pytorch-fid publishes as pt_inception-2015-12-05-6726825d.pth, whose features make FID what papers mean by it, or a run of
configs/classifier_openmoji.py. Scores by different networks, resize modes or numbers of pictures do not compare, so each is
printed with them.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jdiff import command


def main() -> int:
    """Parses, makes features, prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", help="what is scored")
    parser.add_argument("--reference", help="what it is held against (not needed for `is` alone)")
    parser.add_argument(
        "--save-reference", type=Path, metavar="NPZ", help="keep its moments, to be a --reference again"
    )
    parser.add_argument("--network", required=True, help="whose features are compared")
    parser.add_argument("--metrics", default="fid,kid,is,precision,recall", help="by comma; sfid too with Inception")
    parser.add_argument("--resize", default="tf", help="of Inception's pictures: tf, or torch as pytorch-fid does it")
    parser.add_argument("--num", type=int, help="pictures at most, of either side (of a run: how many, 1000)")
    parser.add_argument("--image-size", type=int, help="of folders and openmoji (default: the run's or .npz's)")
    parser.add_argument("--resamples", type=int, default=20, help="bootstrap sets for an interval; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and the resampling")
    parser.add_argument("--json", type=Path, help="append the line to this file (of a run: RUN/scores.jsonl)")
    run = parser.add_argument_group("of a run")
    run.add_argument("--steps", type=int, default=50)
    run.add_argument("--guidance", type=float, default=1.5)
    run.add_argument("--batch-size", type=int, default=64)
    run.add_argument("--weights", choices=("ema", "raw"), default="ema")
    run.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    return command.run("evaluate.py", evaluate, parser.parse_args())


def evaluate(options: argparse.Namespace) -> int:
    """The work behind `main`."""
    command.check_above_zero(options, ("num", "image_size", "steps", "batch_size"))
    from jdiff import runtime
    from jdiff.evaluate.features import open_network
    from jdiff.evaluate.pictures import batches, holds_pictures, moments_of, open_pictures, save_moments
    from jdiff.evaluate.scores import OF_PICTURES, Reference, check_metrics, check_network, scores
    from jdiff.report import SCORES

    runtime.prepare(runtime.cpu_devices(options.batch_size, least=1))
    metrics = options.metrics.split(",")
    of_pictures = not set(metrics).isdisjoint(OF_PICTURES)
    if options.save_reference and not options.reference:
        raise ValueError("--save-reference keeps a --reference: give one")
    stored = options.reference and options.reference.endswith(".npz")
    reference = moments_of(options.reference) if stored else None
    check_metrics(metrics, options.reference, pictures=reference is None or holds_pictures(options.reference))
    network = open_network(options.network, options.resize)
    if reference:
        check_network(reference, network.title)
    size = options.image_size
    facts: dict[str, Any] = {}
    if (Path(options.samples) / "checkpoints").is_dir():
        made, facts, size = from_run(options)
        title = options.samples
    else:
        pictures = open_pictures(options.samples, needed(size, options.samples))
        size = size or pictures.shape[1]
        made, title = batches(pictures, options.num), options.samples
    samples = network.features(made)
    if options.reference and (reference is None or of_pictures):
        found = network.features(batches(open_pictures(options.reference, size), options.num))
        if reference is None:
            reference = Reference.of(f"{len(found)} of {options.reference}", found)
        else:  # a file of both, as ADM's, has the moments of all its pictures
            reference = dataclasses.replace(reference, features=found)
    if options.save_reference and reference:
        save_moments(options.save_reference, reference)
    results = scores(samples, reference, metrics, resamples=options.resamples, seed=options.seed)
    facts |= {
        "samples": title,
        "count": len(samples),
        "reference": reference and reference.title,
        "network": network.title,
        "seed": options.seed,
    }
    print("; ".join(f"{key} {value}" for key, value in facts.items()))
    for name, score in results.items():
        print(f"{name:>10} {score.value:10.4f}   [{score.low:.4f}, {score.high:.4f}]")
    if path := options.json or ("step" in facts and Path(options.samples) / SCORES):
        line = facts | {name: [score.value, score.low, score.high] for name, score in results.items()}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    return 0


def needed(size: int | None, source: str) -> int:
    """--image-size, which an .npz alone does without."""
    if size is None and not source.endswith(".npz"):
        raise ValueError(f"--image-size is missing: {source} may be read at any")
    return size or 0


def from_run(options: argparse.Namespace) -> tuple[Iterator[np.ndarray], dict[str, Any], int]:
    """(pictures, how they are made, their size) of a run's model of classes."""
    import jdiff
    from jdiff import checkpoint
    from jdiff.pipelines import ClassPipeline

    step = max(checkpoint.steps(Path(options.samples)), default=None) if options.step is None else options.step
    pipe = jdiff.pipeline(options.samples, weights=options.weights, step=step)
    if not isinstance(pipe, ClassPipeline):
        raise ValueError(f"{options.samples} takes prompts: make pictures with tools/sample.py --npz, and score those")
    if pipe.model.channels != 3:
        raise ValueError(
            f"{options.samples} makes latents, which no network scores: decode them, and score the pictures"
        )
    count = options.num or 1000
    labels = [i % pipe.model.num_classes for i in range(count)]
    settings = {"steps": options.steps, "guidance_scale": options.guidance, "seed": options.seed}

    def made() -> Iterator[np.ndarray]:
        with tqdm(total=count, unit="image", desc="samples") as bar:
            for pictures in pipe.many(labels, options.batch_size, **settings):
                yield pictures
                bar.update(len(pictures))

    facts = {"step": step, "weights": options.weights, "sampling_steps": options.steps, "guidance": options.guidance}
    return made(), facts, pipe.model.image_size


if __name__ == "__main__":
    sys.exit(main())
