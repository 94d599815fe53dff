"""Scores of pictures: FID, sFID, KID, Inception Score, precision and recall, CLIP score; PSNR, SSIM, LPIPS; each with an interval.

    python tools/evaluate.py runs/a --reference openmoji --network runs/classifier --num 2000
    python tools/evaluate.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz --network pt_inception.pth
    python tools/evaluate.py PICTURES --reference OTHERS --image-size 64 --network runs/classifier --metrics kid,precision
    python tools/evaluate.py prompts.npz --network CLIP --metrics clip
    python tools/evaluate.py runs/vae --reference openmoji:heldout --metrics psnr,ssim

What is scored, and --reference: a folder of pictures, an .npz of them (arr_0), or openmoji[:train|heldout]; the reference may be an
.npz of moments (mu, sigma); what is scored may be a training run of classes, whose labels go round, or of an autoencoder, which
makes the reference's pictures again. --network: the file that pytorch-fid publishes as pt_inception-2015-12-05-6726825d.pth,
whose features make FID what papers mean by it, a run of configs/classifier_openmoji.py, or CLIP's folder with its tokenizer. clip
takes pictures with their prompts: an .npz of tools/sample.py, or a folder with captions. psnr, ssim and lpips compare with the
reference picture by picture, and take no network. Scores by different networks, resize modes or numbers of pictures do not
compare, so each is printed with them.
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

from jdiff import command


def main() -> int:
    """Parses, makes features, prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", help="what is scored")
    parser.add_argument("--reference", help="what it is held against (not needed for is and clip)")
    parser.add_argument(
        "--save-reference", type=Path, metavar="NPZ", help="keep its moments, to be a --reference again"
    )
    parser.add_argument("--network", help="whose features are compared")
    parser.add_argument(
        "--metrics",
        default="fid,kid,is,precision,recall",
        help="by comma; sfid too with Inception, clip with CLIP; psnr, ssim, lpips",
    )
    parser.add_argument("--lpips", type=Path, metavar="FILE", help="safetensors of LPIPS' weights, or a folder of them")
    parser.add_argument("--resize", default="tf", help="of Inception's pictures: tf, or torch as pytorch-fid does it")
    parser.add_argument("--num", type=int, help="pictures at most, of either side (of a run: how many, 1000)")
    parser.add_argument("--image-size", type=int, help="of folders and openmoji (default: the run's or .npz's)")
    parser.add_argument("--resamples", type=int, default=20, help="bootstrap sets for an interval; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and the resampling")
    parser.add_argument("--json", type=Path, help="append the line to this file (of a run: RUN/scores.jsonl)")
    parser.add_argument(
        "--features",
        type=Path,
        metavar="DIR",
        help="keep features there as they are made: a scoring that was killed goes on",
    )
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
    from jdiff import runtime, tree
    from jdiff.evaluate.kept import kept_features
    from jdiff.evaluate.networks import open_network
    from jdiff.evaluate.pictures import batches, check_pairs, open_pictures, prompts_of, save_moments
    from jdiff.evaluate.reconstruction import pair_scores, read_lpips
    from jdiff.evaluate.scores import OF_PICTURES, PAIRED, Reference, check_metrics, check_network, scores, write_scores
    from jdiff.report import SCORES

    runtime.prepare(runtime.cpu_devices(options.batch_size, least=1))
    asked, num = options.metrics.split(","), options.num
    paired, metrics = ([m for m in asked if (m in PAIRED) == wanted] for wanted in (True, False))
    reference = check(options, paired, metrics)
    network = open_network(options.network, options.resize) if metrics else None
    if network:
        check_metrics(metrics, options.reference, network=network)
    if reference and network:
        check_network(reference, network.title)
    lpips_params = read_lpips(options.lpips) if options.lpips else None

    samples, held = open_samples(options, captions="clip" in metrics), None
    by_pictures = reference is None or not set(metrics).isdisjoint(OF_PICTURES)
    if options.reference and (paired or by_pictures):
        held = open_pictures(options.reference, options.image_size or samples.size)
    made, facts, identity = samples.made, {**samples.facts, "samples": options.samples}, samples.identity
    if samples.remake is not None:
        if held is None:
            raise ValueError(
                f"{options.samples} is a run of an autoencoder, which makes a --reference's pictures again"
            )
        remake, originals = samples.remake, held
        made = lambda first: remake(batches(originals, num, first))  # noqa: E731
        identity = {**identity, "of": held.fingerprint, "num": num}
    elif paired:
        check_pairs(samples.pictures, held, (options.samples, options.reference))

    results, count = {}, 0
    if network:
        prompts = prompts_of(options.samples, samples.pictures, num) if "clip" in metrics else ()
        found = kept_features(network, made, options.features, {**facts, **identity}, prompts)
        if held is not None and by_pictures:
            theirs = {"pictures": held.fingerprint, "shape": held.shape, "num": num}
            features = kept_features(network, partial(batches, held, num), options.features, theirs)
            if reference is None:
                reference = Reference.of(f"{len(features)} of {options.reference}", features)
            else:  # a file of both, as ADM's, has the moments of all its pictures
                reference = dataclasses.replace(reference, features=features)
        if options.save_reference and reference:
            save_moments(options.save_reference, reference)
        results, count = scores(found, reference, metrics, resamples=options.resamples, seed=options.seed), len(found)
    if paired:
        more, count = pair_scores(zip(batches(held, num), made(0), strict=True), paired, lpips_params)
        results |= more
    facts |= {"count": count, "reference": reference.title if reference else options.reference}
    facts |= {"network": network.title} if network else {}
    facts |= {"lpips": tree.fingerprint(lpips_params)} if lpips_params else {}
    facts["seed"] = options.seed
    print("; ".join(f"{key} {value}" for key, value in facts.items()))
    for name in asked:
        score = results[name]
        print(f"{name:>10} {score.value:10.4f}   [{score.low:.4f}, {score.high:.4f}]")
    if path := options.json or ("step" in facts and Path(options.samples) / SCORES):
        write_scores(path, facts, results)
    return 0


def check(options: argparse.Namespace, paired: list[str], metrics: list[str]) -> Any:
    """ValueError for options that do not go together; a reference's moments, where it is a file of them."""
    from jdiff.evaluate.pictures import holds_pictures, moments_of
    from jdiff.evaluate.scores import check_metrics

    if options.save_reference and not (options.reference and metrics):
        raise ValueError("--save-reference keeps a --reference by a network: give one, and metrics that take features")
    stored = options.reference and options.reference.endswith(".npz")
    reference = moments_of(options.reference) if stored else None
    pictures = reference is None or holds_pictures(options.reference)
    check_metrics(metrics, options.reference, pictures=pictures)
    if paired and not (options.reference and pictures):
        raise ValueError(f"{paired[0]} compares with pictures, one by one: give a --reference of them")
    if ("lpips" in paired) != bool(options.lpips):
        raise ValueError("lpips among the --metrics, and --lpips, the file of its weights, go together")
    if metrics and not options.network:
        raise ValueError(f"--network is missing: whose features are {metrics[0]}'s?")
    if not metrics and (options.network or options.features):
        raise ValueError(f"--network and --features are not for {', '.join(paired)}: leave them out")
    return reference


def open_samples(options: argparse.Namespace, captions: bool) -> Any:
    """What is scored, as `jdiff.evaluate.samples` has it."""
    from jdiff.evaluate.samples import of_pictures, of_run

    if not (Path(options.samples) / "checkpoints").is_dir():
        return of_pictures(options.samples, options.image_size, options.num, captions)
    if captions:
        raise ValueError(f"clip: {options.samples} is a run: make pictures with tools/sample.py --npz, and score those")
    return of_run(
        Path(options.samples),
        count=options.num or 1000,
        batch_size=options.batch_size,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        weights=options.weights,
        step=options.step,
        image_size=options.image_size,
    )


if __name__ == "__main__":
    sys.exit(main())
