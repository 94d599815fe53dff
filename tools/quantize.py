"""int8 and int4 copies of checkpoints, and how far they are from the original.

    python tools/quantize.py runs/a small/ --recipe w8a8      # a run, a diffusers folder, DiT's .pt, … -> a folder of jdiff's
    python tools/quantize.py runs/a --recipe w4 --dry-run     # what each rule does, and the bytes it saves; nothing is written
    python tools/quantize.py runs/a small/ --recipe w8a8-static --calibrate 16 --balance
    python tools/quantize.py runs/a small/ --recipe w8a8-static --calibrate openmoji
    python tools/quantize.py report runs/a --recipe w8a8 --recipe w4 --page int8.html
    python tools/quantize.py report runs/a --recipe w4 --other runs/a_distilled     # and what was trained since
    python tools/quantize.py export small/ golden/            # integers, and each product's inputs and outputs, for other runtimes

The copy is sampled, loaded and adapted like any checkpoint (tools/sample.py small/). The report: the relative squared error of the
model's output by noise level; how far pictures from the same noise drift apart, step by step, and their PSNR; what each kernel does
when it alone is rounded; all beside bfloat16 and another seed. --calibrate takes a number of the model's own pictures, or a data
set: openmoji[:train|heldout], a folder of pictures (with captions for a model of texts) or a cache of latents, or NAME:PATH with a
config's data.name.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jdiff import command

RECIPES = ("w8a8", "w8a8-static", "w8", "w4")
MOST_RECORDS = 64
"""Of a data set that --calibrate names."""
Look = tuple[Any, Any, Any]
"""(the `Subject`, what its model is shown to be calibrated, the peaks of its activations)."""


def main() -> int:
    """Parses, does it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = sys.argv[1:]
    works = {"report": report, "export": export}
    name = arguments[0] if arguments and arguments[0] in works else ""
    parser.add_argument("src", help="a training run, or any checkpoint that tools/convert.py reads; to export, a copy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--prompt", action="append", help="of a model of texts (default: the run's own); may be given again"
    )
    if name == "export":
        parser.add_argument("dest", type=Path, help="a folder that must not exist yet")
        parser.add_argument("--num", type=int, default=2, help="rows of the batch")
        return command.run("quantize.py", export, parser.parse_args(arguments[1:]))
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a run")
    parser.add_argument("--step", type=int, help="a run's checkpoint (default: the newest)")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler, for a report and for calibration")
    parser.add_argument(
        "--guidance", type=float, help="classifier-free guidance scale; 1 is none (4 by label, 7.5 by prompt)"
    )
    parser.add_argument(
        "--calibrate",
        metavar="N|DATA",
        help="watch activations on N of the model's own pictures, or on a data set's (w8a8-static needs it)",
    )
    parser.add_argument("--balance", action="store_true", help="with --calibrate: even out channels, where that helps")
    parser.add_argument(
        "--gptq", action="store_true", help="with --calibrate: round kernels by what their inputs are (w4)"
    )
    if name == "report":
        parser.add_argument("--recipe", choices=RECIPES, action="append", default=[], help="may be given again")
        parser.add_argument(
            "--other", metavar="PATH", action="append", default=[], help="a run or copy to compare; may be given again"
        )
        parser.add_argument("--num", type=int, default=40, help="pictures; labels or prompts go round")
        parser.add_argument("--page", type=Path, help="an HTML file for the tables and curves")
    else:
        parser.add_argument("dest", type=Path, nargs="?", help="a folder that must not exist yet")
        parser.add_argument("--recipe", choices=RECIPES, required=True)
        parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    return command.run("quantize.py", works.get(name, quantize), parser.parse_args(arguments[bool(name) :]))


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
    runtime.prepare(runtime.cpu_devices(number(options) or (MOST_RECORDS if options.calibrate else 1), least=1))
    opened = open_checkpoint(options)
    rules = quant.find_recipe(options.recipe)
    if options.dry_run:
        for name in (name for name in opened.models if name in rules):
            print(f"{name}:\n{quant.table(quant.describe(opened.models[name][1], rules[name]))}")
        return 0
    before = quantized.size(opened.models)
    made = copy_of(
        opened, options, options.recipe, seen(open_pipeline(options), opened, options) if options.calibrate else None
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
    command.check_above_zero(options, ("steps",))
    if options.calibrate and number(options) == 0:
        raise ValueError("--calibrate=0 must be above 0")
    for name, why in (("balance", "how channels differ"), ("gptq", "what kernels' inputs are")):
        if getattr(options, name) and not options.calibrate:
            raise ValueError(f"--{name} needs --calibrate: {why} is seen on pictures")
    if options.calibrate and not recipes:
        raise ValueError("--calibrate is of a --recipe: give one")
    if "w8a8-static" in recipes and not options.calibrate:
        raise ValueError("--recipe w8a8-static needs --calibrate N: its steps are fixed by what is seen on pictures")


def number(options: argparse.Namespace) -> int | None:
    """How many of the model's own pictures it is calibrated on; None where it is a data set, or not at all."""
    return int(options.calibrate) if options.calibrate and options.calibrate.isdecimal() else None


def open_checkpoint(options: argparse.Namespace) -> Any:
    """The source."""
    from jdiff import loading

    return loading.open_checkpoint(loading.convert.locate(options.src), weights=options.weights, step=options.step)


def open_pipeline(options: argparse.Namespace, precision: str = "fp32") -> Any:
    """The source's pipeline."""
    from jdiff import loading

    return loading.pipeline(options.src, precision=precision, weights=options.weights, step=options.step)


def asked(pipe: Any, opened: Any, options: argparse.Namespace, num: int) -> Any:
    """The pipeline as a `Subject`, with labels or prompts that go round."""
    from jdiff.evaluate.subject import Classes, Texts
    from jdiff.pipelines import ClassPipeline

    if isinstance(pipe, ClassPipeline):
        if options.prompt:
            raise ValueError(f"--prompt: the model in {options.src} takes labels, not prompts")
        return Classes(pipe, [i % pipe.model.num_classes for i in range(num)])
    prompts = options.prompt or (opened.meta and opened.meta["config"]["sample"]["prompts"])
    if not prompts:
        raise ValueError(f"--prompt: the model in {options.src} takes texts, and has none of its own: give some")
    return Texts(pipe, [prompts[i % len(prompts)] for i in range(num)])


def settings(opened: Any, options: argparse.Namespace) -> dict[str, Any]:
    """How pictures are made."""
    guidance = {"dit": 4.0}.get(opened.main, 7.5) if options.guidance is None else options.guidance
    return {"steps": options.steps, "guidance_scale": guidance}


def seen(pipe: Any, opened: Any, options: argparse.Namespace) -> Look:
    """What calibration looks at."""
    from jdiff import quant
    from jdiff.evaluate import calibration

    recipe = options.recipe if isinstance(options.recipe, str) else options.recipe[0]
    if (num := number(options)) is None:
        subject, x_0 = calibration.of_data(pipe, open_data(pipe, options), MOST_RECORDS)
    else:
        subject = asked(pipe, opened, options, num)
        # other pictures than a report's
        x_0, _ = subject.samples(seed=options.seed + 1, **settings(opened, options))
    batches = calibration.shown(subject, x_0, seed=options.seed + 1)
    return subject, batches, calibration.peaks_of(subject, quant.find_recipe(recipe)[opened.main], batches)


def open_data(pipe: Any, options: argparse.Namespace) -> Any:
    """The data set that --calibrate names; DataError for one that is not there, or is empty."""
    from jdiff.data import open_source
    from jdiff.data.source import NAMES
    from jdiff.pipelines import TextPipeline

    texts = isinstance(pipe, TextPipeline)
    size = pipe.geometry.default_size[0] if texts else pipe.model.image_size
    name, _, rest = options.calibrate.partition(":")
    if name not in NAMES:
        name, rest = "captions" if texts else "imagefolder", options.calibrate
        name = "latents" if (Path(rest) / "meta.json").is_file() else name
    if name == "openmoji":
        return open_source(name, image_size=size, split=rest or "all")
    return open_source(name, path=rest, image_size=size)


def copy_of(opened: Any, options: argparse.Namespace, recipe: str, look: Look | None) -> Any:
    """A checkpoint quantized, by what was `seen` where it was calibrated."""
    from jdiff import loading, quant
    from jdiff.evaluate import calibration

    if look is None:
        return loading.quantized(opened, recipe)
    subject, batches, peaks = look
    for name, given in (("balance", options.balance), ("gptq", options.gptq)):
        if given and opened.scales is not None:
            raise ValueError(
                f"--{name} is for kernels without scales, and {options.src} has learned some: leave it out"
            )
    rules = quant.find_recipe(recipe)[opened.main]
    if options.balance:
        if opened.main != "dit":
            raise ValueError(f"--balance is for a DiT's channels, and {options.src} is a model of texts: leave it out")
        params, peaks, alphas = calibration.balance(subject, rules, batches, peaks)
        for path, alpha in alphas.items():
            print(f"{path}: {'as it was' if alpha is None else f'balanced, alpha {alpha:g}'}")
        opened = replace(opened, models={**opened.models, "dit": (subject.model, params)})
        subject = subject.changed(params)
    moments = calibration.moments_of(subject, rules, batches) if options.gptq else None
    made = loading.quantized(opened, recipe, () if options.balance else None, peaks, moments)
    return replace(made, quantized=replace(made.quantized, balanced=options.balance))


def report(options: argparse.Namespace) -> int:
    """Prints the tables, and writes the page."""
    check(options, options.recipe)
    command.check_above_zero(options, ("num",))
    if not options.recipe and not options.other:
        raise ValueError("there is nothing to compare: give a --recipe, or an --other")
    from jdiff import quant, runtime
    from jdiff.evaluate import rounding, rounding_page

    runtime.prepare(runtime.cpu_devices(options.num, least=1))
    opened = open_checkpoint(options)
    if opened.quantized is not None:
        raise ValueError(f"{options.src} is quantized already: give what it was made of, and --recipe")
    pipe = open_pipeline(options)
    subject = asked(pipe, opened, options, options.num)
    others, look = {}, seen(pipe, opened, options) if options.calibrate else None
    for name in dict.fromkeys(options.recipe):
        others[name] = subject.changed(copy_of(opened, options, name, look).models[opened.main][1])
    for path in options.other:
        others[path] = comparable(subject, path, opened, options)
    bf16 = asked(open_pipeline(options, "bf16"), opened, options, options.num)
    how = settings(opened, options)
    known, ways = {**others, "bf16": bf16}, samplers(subject, opened)
    found, x_0, pictures = rounding.compare(subject, known, ways, seed=options.seed, **how)
    title = f"{options.src}: {options.num} pictures, {options.steps} steps, guidance {how['guidance_scale']:g}, seed {options.seed}"
    print(f"{title}\n{rounding.tables(found)}")
    alone = {}
    for name in dict.fromkeys(options.recipe):
        rounded = others[name].params
        if options.balance:  # whose kernels take other inputs than the original's
            rounded = quant.quantize(subject.params, quant.find_recipe(name)[opened.main], peaks=look and look[2])
        alone[name] = rounding.sensitivity(subject, rounded, {"bf16": bf16}, x_0, options.seed)
        print(f"\n{name}\n{rounding.ranking(*alone[name])}")
    if options.page:
        rounding_page.write(options.page, title, pictures, found, alone)
    return 0


def comparable(subject: Any, path: str, opened: Any, options: argparse.Namespace) -> Any:
    """Another checkpoint, asked for the same; ValueError where its model takes or makes other things."""
    from jdiff import loading

    other = asked(loading.pipeline(path, precision="fp32"), opened, options, options.num)
    fields = ("image_size", "channels", "num_classes", "in_channels", "out_channels", "cross_attention_dim")
    theirs, ours = ({name: getattr(one.model, name, None) for name in fields} for one in (other, subject))
    for name in fields:
        if theirs[name] != ours[name]:
            raise ValueError(
                f"--other {path} has {name} {theirs[name]}, and {options.src} {ours[name]}: they cannot be compared"
            )
    return other


def samplers(subject: Any, opened: Any) -> list[str]:
    """The run's own, and DDIM; of a flow Euler's method, which is DDIM's step there."""
    own = subject.sampler
    if opened.meta is not None and opened.main == "dit":
        own = opened.meta["config"]["sample"]["sampler"]
    other = subject.sampler if opened.main == "dit" else "ddim"
    return list(dict.fromkeys((own, other)))


def export(options: argparse.Namespace) -> int:
    """Writes a copy's integers and its golden batch."""
    command.check_above_zero(options, ("num",))
    from jdiff import loading, runtime
    from jdiff.evaluate import golden

    runtime.prepare(1)
    opened = loading.open_checkpoint(loading.convert.locate(options.src))
    subject = asked(loading.pipeline(options.src), opened, options, options.num)
    for name, digest in golden.write(options.dest, subject, options.seed).items():
        print(f"  sha256 {digest}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
