"""LoRA files: looked at, converted, resized, merged into a model and taken out of it, extracted from two; without PyTorch.

    python tools/lora.py info style.safetensors
    python tools/lora.py convert style.safetensors style/ --to peft --dtype bf16
    python tools/lora.py resize style.safetensors small.safetensors --rank 4
    python tools/lora.py merge sd15/ style.safetensors:0.8 hand.safetensors merged/
    python tools/lora.py unmerge merged/ style.safetensors:0.8 sd15-again/
    python tools/lora.py extract sd15/ finetuned/ difference.safetensors --rank 32

A LORA is peft's folder, diffusers' folder or file, or kohya's file, told by its content, or a LoRA run of jdiff's. Its names are
held against a model's: Stable Diffusion 1.5's, a run's own, or that of --base. BASE and TUNED are any checkpoint that
tools/convert.py reads, a run of jdiff's among them.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from tqdm import tqdm

DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
FORMATS = ("peft", "diffusers", "kohya")
BAR: dict[str, Any] = {"leave": False, "delay": 1, "mininterval": 0.5}


def main() -> int:
    """Parses, does it, reports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    places = {
        "info": ("what is in it", ["lora"]),
        "convert": ("the same adapters in another format", ["lora", "dest"]),
        "resize": ("the best adapters of a smaller rank", ["lora", "dest"]),
        "merge": ("a model with adapters added to its weights", ["base", "loras", "dest"]),
        "unmerge": ("a model with adapters taken out again", ["base", "loras", "dest"]),
        "extract": ("the difference of two models as adapters", ["base", "tuned", "dest"]),
    }
    commands = {}
    for verb, (text, names) in places.items():
        commands[verb] = verbs.add_parser(verb, help=text)
        for name in names:
            if name == "loras":
                commands[verb].add_argument(name, nargs="+", metavar="LORA[:SCALE]")
            else:
                commands[verb].add_argument(name, type=Path if name == "dest" else str, metavar=name.upper())
    for verb in ("info", "convert", "resize"):
        commands[verb].add_argument("--base", help="the model that it adapts (default: Stable Diffusion 1.5)")
    for verb, needed in (("convert", True), ("resize", False), ("extract", False)):
        commands[verb].add_argument("--to", choices=FORMATS, required=needed, help="format of DEST")
        commands[verb].add_argument("--dtype", choices=DTYPES, help="what the numbers are cast to")
    for verb in ("resize", "extract"):
        commands[verb].add_argument("--rank", type=int, required=True)
    for verb in ("merge", "unmerge"):
        commands[verb].add_argument(
            "--to", choices=("diffusers", "dit", "compvis", "safetensors"), help="format of DEST"
        )
    args, start = parser.parse_args(), time.monotonic()
    run = {"info": info, "convert": convert, "resize": resize, "extract": extract}.get(args.verb, merge)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{time.monotonic() - start:.1f} s")
    return 0


# What is opened


def open_lora(
    source: str, base: str | None, bundle: Any = None, untouched: bool = False
) -> tuple[Any, dict[str, Any], Any]:
    """(file, the models that it adapts, where it lands in them), and says what it is. bundle: the base, when it is open;
    untouched: whether it must be what a run was trained on."""
    from jdiff import loading, models
    from jdiff.convert import hub, lora

    path, own = hub.locate(source), None
    if (path / "checkpoints").is_dir():
        adapters, meta = loading.load_adapters(path)
        own = {name: models.build(record) for name, record in meta["models"].items()}
        file = lora.from_adapters(adapters, own, path)
        if untouched:
            loading.check_base(
                meta["lora"], {name: part.params for name, part in bundle.parts.items()}, base or "the base"
            )
    else:
        file = lora.read(path)
    print(f"{source}: {described(file)}")
    what = base or ("its base" if own else "Stable Diffusion 1.5")
    if base is not None:
        modules = {name: part.module for name, part in (bundle or loading.open_bundle(base)[0]).parts.items()}
    else:
        modules = own or {name: models.create(f"sd15/{name}") for name in ("unet", "text")}
    landing = lora.land(file, modules)
    print(f"{landing.matched} of {landing.total} arrays fit {what}")
    return file, modules, landing


def described(file: Any) -> str:
    """A file's format, adapters, ranks, alphas, dtypes, parameters and size, in a line."""
    from jdiff.convert.lora_config import alpha

    every = [one for found in file.adapters.values() for one in found.values()]
    arrays = [x for one in every for x in (one.a, one.b, one.magnitude) if x is not None]
    models = ", ".join(f"{name or 'one model'} {len(found)}" for name, found in sorted(file.adapters.items()))
    kind = "DoRA" if any(one.magnitude is not None for one in every) else "LoRA"
    parts = [
        f"{kind} in {file.format}'s format",
        f"{len(every)} adapters ({models})",
        f"rank {counted(one.rank for one in every)}",
        f"alpha {counted(alpha(one.scale, one.rank) for one in every)}",
        counted(str(x.dtype) for x in arrays),
        f"{sum(x.size for x in arrays):,} parameters",
        f"{sum(x.nbytes for x in arrays) / 1e6:.2f} MB",
    ]
    return ", ".join(parts)


def counted(values: Any) -> str:
    """The values with how often each is there, when there are several."""
    found = Counter(values)
    return (
        str(next(iter(found))) if len(found) == 1 else " ".join(f"{v}({n})" for v, n in sorted(found.items(), key=str))
    )


def plain(text: str) -> str:
    """Text from a file, without what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


# What is done


def info(args: argparse.Namespace) -> None:
    """Prints what a file is, where it fits, and its header."""
    file, _, landing = open_lora(args.lora, args.base)
    for problem in landing.problems[:3]:
        print(f"  {plain(problem)}")
    if landing.problems and args.base is None:
        print("  give --base if it is for another model")
    for key, value in sorted(file.metadata.items()):
        print(f"  {plain(key)}: {plain(value[:100])}{'…' if len(value) > 100 else ''}")


def convert(args: argparse.Namespace) -> None:
    """The same numbers under other names."""
    from jdiff.convert import lora

    file, modules, landing = open_lora(args.lora, args.base)
    names = landing.namings if args.to == file.format else None
    write(args, lora.fit(file, modules, None), modules, args.to, metadata=file.metadata, namings=names)


def resize(args: argparse.Namespace) -> None:
    """Adapters of a smaller rank, in the file's own format and dtype unless others are asked for."""
    from jdiff import lora as adapters
    from jdiff.convert import lora

    file, modules, landing = open_lora(args.lora, args.base)
    names = landing.namings if args.to in (None, file.format) else None
    found = lora.fit(file, modules)
    ranks = {name: max(one["a"].shape[-1] for one in adapters.by_path(part).values()) for name, part in found.items()}
    if max(ranks.values()) <= args.rank:
        raise ValueError(f"no adapter has a rank above {args.rank}")
    small = {
        name: adapters.resize(part, args.rank) if ranks[name] > args.rank else part
        for name, part in tqdm(found.items(), desc="resizing", **BAR)
    }
    kinds = Counter(stored.a.dtype for part in file.adapters.values() for stored in part.values())
    args.dtype = args.dtype or next((key for key, dtype in DTYPES.items() if dtype == kinds.most_common(1)[0][0]), None)
    write(args, small, modules, args.to or file.format, metadata=file.metadata, namings=names)


def merge(args: argparse.Namespace) -> None:
    """A model with adapters in its weights, or out of them again."""
    from jdiff import lora as adapters
    from jdiff import tree
    from jdiff.convert import export, lora
    from jdiff.convert.arrays import numbers
    from jdiff.loading import open_bundle
    from jdiff.pipelines.loras import split_scale

    export.vacant(args.dest)
    bundle, options = open_bundle(args.base)
    found = []
    for source, strength in map(split_scale, args.loras):
        file, modules, _ = open_lora(source, args.base, bundle, untouched=args.verb == "merge")
        trees = lora.fit(file, modules)
        found += [
            (name, path, one, strength) for name, at in trees.items() for path, one in adapters.by_path(at).items()
        ]
    # DoRA is relative to the base alone: it comes first, and there is room for one
    found.sort(key=lambda one: "magnitude" not in one[2])
    places = Counter((name, path) for name, path, one, _ in found if "magnitude" in one)
    if places and max(places.values()) > 1:
        raise ValueError(
            f"two DoRAs are relative to the same kernel {max(places, key=lambda p: places[p])[1]!r}: merge one"
        )
    change = adapters.merge if args.verb == "merge" else adapters.unmerge
    flat = {name: tree.flatten(part.params) for name, part in bundle.parts.items()}
    for name, path, one, strength in tqdm(found, desc=args.verb, unit="kernel", **BAR):
        flat[name][path] = np.asarray(change({path: numbers(flat[name][path])}, {path: one}, strength)[path])
    for name, part in bundle.parts.items():
        part.params = jax.tree.unflatten(jax.tree.structure(part.params), list(flat[name].values()))
    with tqdm(total=export.needs(bundle), desc="writing", unit="B", unit_scale=True, **BAR) as bar:

        def advance(size: int) -> None:
            bar.update(size)

        report = export.write(bundle, args.dest, args.to, title=Path(args.base).name, after=advance, **options)
    for note in report.notes:
        print(note)
    print(f"{len(found)} kernels changed, {report.arrays} arrays written to {args.dest}")


def extract(args: argparse.Namespace) -> None:
    """The difference of two models' kernels, each at most of a rank."""
    from jdiff import lora as adapters
    from jdiff import tree
    from jdiff.convert import export
    from jdiff.convert.arrays import numbers
    from jdiff.convert.engine import shapes
    from jdiff.loading import open_bundle

    export.vacant(args.dest)
    base, tuned = (open_bundle(source)[0].parts for source in (args.base, args.tuned))
    if {name: part.module for name, part in base.items()} != {name: part.module for name, part in tuned.items()}:
        raise ValueError(
            f"{args.base} and {args.tuned} are not of the same models: {', '.join(base)} and {', '.join(tuned)}"
        )
    modules = {name: part.module for name, part in base.items()}
    made: dict[str, dict[str, Any]] = {}
    shares, beyond = [], []
    pairs = [(name, path, old) for name, part in base.items() for path, old in tree.flatten(part.params).items()]
    targets = {
        name: adapters.targets(shapes(module), [adapters.Rule("all", args.rank)]) for name, module in modules.items()
    }
    new = {name: tree.flatten(part.params) for name, part in tuned.items()}
    for name, path, old in tqdm(pairs, desc="extracting", unit="array", **BAR):
        before, after = numbers(old), numbers(new[name][path])
        if np.array_equal(before, after):
            continue
        if path not in targets[name]:
            beyond.append(f"{name}/{path}")
            continue
        if before.dtype != after.dtype:
            raise ValueError(
                f"{name}/{path} is {before.dtype} and {after.dtype}: cast one model by tools/convert.py --dtype"
            )
        one, share = adapters.extract({path: before}, {path: after}, ".*", rank=args.rank)
        made.setdefault(name, {})[path] = adapters.by_path(one)[path]
        shares += share.values()
    if not made:
        raise ValueError(f"{args.base} and {args.tuned} differ in no kernel")
    print(f"{np.mean(shares):.1%} of a kernel's squared change explained, {min(shares):.1%} at least")
    if beyond:
        print(
            f"{len(beyond)} arrays changed that no adapter reaches: {', '.join(beyond[:3])}{', …' if len(beyond) > 3 else ''}"
        )
    to = args.to or ("kohya" if args.dest.suffix == ".safetensors" else "peft")
    write(args, {name: tree.nested(found) for name, found in made.items()}, modules, to)


def write(args: argparse.Namespace, found: Any, modules: dict[str, Any], to: Any, **rest: Any) -> None:
    """Writes adapters, and says what they have become."""
    from jdiff.convert import lora

    report = lora.write(found, modules, args.dest, to, DTYPES.get(args.dtype), **rest)
    print(f"{args.dest}: {described(lora.read(args.dest))}")
    for name, digest in report.hashes.items():
        print(f"  sha256 {digest}  {name}")


if __name__ == "__main__":
    sys.exit(main())
