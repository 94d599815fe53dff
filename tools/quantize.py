"""int8 and int4 copies of checkpoints, and how far they are from the original.

    python tools/quantize.py runs/a small/ --recipe w8a8      # a run, a diffusers folder, DiT's .pt, … -> a folder of jdiff's
    python tools/quantize.py runs/a --recipe w4 --dry-run     # what each rule does, and the bytes it saves; nothing is written
    python tools/quantize.py runs/a small/ --recipe w8a8-static --calibrate 16 --balance
    python tools/quantize.py report runs/a --recipe w8a8 --recipe w4
    python tools/quantize.py report runs/a --recipe w4 --other runs/a_distilled     # and what was trained since

The copy is sampled, loaded and adapted like any checkpoint (tools/sample.py small/). The report is of a model of classes: the
relative squared error of the model's output by noise level, and the PSNR of pictures from the same noise, beside those of bfloat16
and of another seed.
"""

import argparse
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jdiff import command

RECIPES = ("w8a8", "w8a8-static", "w8", "w4")


def main() -> int:
    """Parses, does it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = sys.argv[1:]
    reports = arguments[:1] == ["report"]
    parser.add_argument("src", help="a training run, or any checkpoint that tools/convert.py reads")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a run")
    parser.add_argument("--step", type=int, help="a run's checkpoint (default: the newest)")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler, for a report and for calibration")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance scale; 1 is none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--calibrate",
        type=int,
        metavar="N",
        help="watch activations on N of the model's own pictures (w8a8-static needs it)",
    )
    parser.add_argument("--balance", action="store_true", help="with --calibrate: even out channels, where that helps")
    if reports:
        parser.add_argument("--recipe", choices=RECIPES, action="append", default=[], help="may be given again")
        parser.add_argument(
            "--other", metavar="PATH", action="append", default=[], help="a run or copy to compare; may be given again"
        )
        parser.add_argument("--num", type=int, default=40, help="pictures; labels go round through all classes")
    else:
        parser.add_argument("dest", type=Path, nargs="?", help="a folder that must not exist yet")
        parser.add_argument("--recipe", choices=RECIPES, required=True)
        parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    return command.run("quantize.py", report if reports else quantize, parser.parse_args(arguments[reports:]))


def quantize(options: argparse.Namespace) -> int:
    """Writes the copy, or says what it would be."""
    start = time.monotonic()
    from jdiff import loading, quant, runtime
    from jdiff.convert import export, quantized

    check(options, [options.recipe])
    if options.dest is None and not options.dry_run:
        raise ValueError("DEST is missing: the folder to write, or --dry-run")
    if options.dest is not None:
        export.vacant(options.dest)
    runtime.prepare(runtime.cpu_devices(options.calibrate or 1, least=1))
    opened = loading.open_checkpoint(loading.convert.locate(options.src), weights=options.weights, step=options.step)
    rules = quant.find_recipe(options.recipe)
    if options.dry_run:
        for name in (name for name in opened.models if name in rules):
            print(f"{name}:\n{quant.table(quant.describe(opened.models[name][1], rules[name]))}")
        return 0
    before = quantized.size(opened.models)
    made = copy_of(
        opened, options, options.recipe, seen(open_pipeline(options), options) if options.calibrate else None
    )
    after = quantized.size(made.models)
    with tqdm(total=after, unit="B", unit_scale=True, desc="writing", leave=False, delay=1) as bar:
        sums = loading.save_quantized(made, options.dest, lambda size: bar.update(size) and None)
    print(f"{options.dest}: {after / 1e6:.1f} MB, {before / after:.2f} times smaller, read back and compared")
    for name, digest in sums.items():
        print(f"  sha256 {digest}  {name}")
    print(f"{time.monotonic() - start:.1f} s")
    return 0


def check(options: argparse.Namespace, recipes: list[str]) -> None:
    """ValueError for options that do not go together."""
    command.check_above_zero(options, ("steps", "calibrate"))
    if options.balance and not options.calibrate:
        raise ValueError("--balance needs --calibrate N: how channels differ is seen on pictures")
    if "w8a8-static" in recipes and not options.calibrate:
        raise ValueError("--recipe w8a8-static needs --calibrate N: its steps are fixed by what is seen on pictures")


def open_pipeline(options: argparse.Namespace, precision: str = "fp32") -> Any:
    """The source's pipeline. Errors as `of_classes`'."""
    return of_classes(options.src, precision=precision, weights=options.weights, step=options.step)


def of_classes(path: str, **settings: Any) -> Any:
    """A path's pipeline; ValueError for a model of texts."""
    from jdiff import loading
    from jdiff.pipelines import ClassPipeline

    pipe = loading.pipeline(path, **settings)
    if not isinstance(pipe, ClassPipeline):
        raise ValueError(f"{path} is a model of texts, and calibration and reports are of models of classes")
    return pipe


def seen(pipe: Any, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(a pipeline, what its model is shown to be calibrated, the peaks of its activations)."""
    from jdiff.evaluate import calibration

    labels = [i % pipe.model.num_classes for i in range(options.calibrate)]
    # other pictures than a report's
    settings = {"seed": options.seed + 1, "steps": options.steps, "guidance_scale": options.guidance}
    batches = calibration.shown(pipe, labels, **settings)
    return pipe, batches, calibration.peaks_of(pipe, batches)


def copy_of(opened: Any, options: argparse.Namespace, recipe: str, look: tuple[Any, Any, Any] | None) -> Any:
    """A checkpoint quantized, by what was `seen` where it was calibrated."""
    from jdiff import loading, quant
    from jdiff.evaluate import calibration

    if look is None:
        return loading.quantized(opened, recipe)
    pipe, batches, peaks = look
    if not options.balance:
        return loading.quantized(opened, recipe, peaks=peaks)
    if opened.scales is not None:
        raise ValueError(f"--balance changes the kernels that {options.src} has learned scales for: leave it out")
    params, peaks, alphas = calibration.balance(pipe, quant.find_recipe(recipe)["dit"], batches, peaks)
    for path, alpha in alphas.items():
        print(f"{path}: {'as it was' if alpha is None else f'balanced, alpha {alpha:g}'}")
    module, _ = opened.models["dit"]
    made = loading.quantized(replace(opened, models={**opened.models, "dit": (module, params)}), recipe, (), peaks)
    return replace(made, quantized=replace(made.quantized, balanced=True))


def report(options: argparse.Namespace) -> int:
    """Prints the table."""
    check(options, options.recipe)
    command.check_above_zero(options, ("num",))
    from jdiff import loading, runtime
    from jdiff.evaluate import rounding
    from jdiff.pipelines.rows import place

    runtime.prepare(runtime.cpu_devices(options.num, least=1))
    pipe = open_pipeline(options)
    opened = loading.open_checkpoint(loading.convert.locate(options.src), weights=options.weights, step=options.step)
    others, look = {}, seen(pipe, options) if options.calibrate else None
    for name in dict.fromkeys(options.recipe):
        others[name] = copy.copy(pipe)
        others[name].params = place(pipe.mesh, copy_of(opened, options, name, look).models["dit"][1])
    for path in options.other:
        others[path] = of_classes(path, precision="fp32")
        theirs, ours = ((m.image_size, m.channels, m.num_classes) for m in (others[path].model, pipe.model))
        if theirs != ours:
            raise ValueError(
                f"--other {path} is of {theirs} (size, channels, classes), and {options.src} of {ours}: they cannot be compared"
            )
    others["bf16"] = open_pipeline(options, "bf16")
    labels = [i % pipe.model.num_classes for i in range(options.num)]
    settings = {"seed": options.seed, "steps": options.steps, "guidance_scale": options.guidance}
    found = rounding.compare(pipe, others, labels, **settings)
    print(
        f"{options.num} pictures, {options.steps} steps of {pipe.sampler}, guidance {options.guidance:g}, seed {options.seed}"
    )
    print(rounding.table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
