"""Checkpoints from one format into another, checked array by array; runs without PyTorch.

    python tools/convert.py DiT-XL-2-256x256.pt dit/ --to diffusers
    python tools/convert.py v1-5-pruned.ckpt sd15/ --to diffusers --tokenizer openai/clip-vit-large-patch14 --raw
    python tools/convert.py sd15/ sd15.safetensors --to compvis --dtype fp16
    python tools/convert.py stabilityai/sd-vae-ft-mse vae.safetensors --to safetensors
    python tools/convert.py runs/a dit.pt --to dit                        # a run of jdiff's
    python tools/convert.py sd15/ out/ --push OWNER/NAME                  # and to the Hugging Face hub

SRC is told by its content: a diffusers pipeline or component folder, a transformers CLIP folder, DiT's or SiT's .pt, a CompVis
checkpoint or autoencoder (.ckpt, .safetensors), a run of jdiff's, or OWNER/NAME[/FOLDER or FILE][@REVISION] on the hub. Formats:
diffusers (a folder), dit (a .pt, or .safetensors with the same names), compvis (a .ckpt or .safetensors) and safetensors (one
model in one file). Without --to it is written as what it is, byte for byte.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def open_source(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """(bundle, what else `export.write` needs) of SRC."""
    from jdiff.loading import open_bundle, tokenizer_folder

    weights = "ema" if args.ema else "raw" if args.raw else None
    words = None if args.tokenizer is None else tokenizer_folder(args.tokenizer)
    bundle, options = open_bundle(args.src, weights=weights, heads=args.heads, mixed=args.dtype is not None)
    return bundle, {**options, "tokenizer": words or options.get("tokenizer")}


def main() -> int:
    """Parses, reads, writes, reports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="a file, a folder, or a repository of the hub")
    parser.add_argument("dest", type=Path, help="what must not exist yet")
    parser.add_argument("--to", choices=("diffusers", "dit", "compvis", "safetensors"), help="default: as it is")
    parser.add_argument("--dtype", choices=DTYPES, help="what parameters are cast to (default: as they are)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_true", help="only the moving average, where there are both")
    which.add_argument("--raw", action="store_true", help="only the raw parameters, where there are both")
    parser.add_argument(
        "--heads", type=int, help="attention heads, of a single file of unusual size that cannot say it"
    )
    parser.add_argument("--tokenizer", help="its folder or repository, for a diffusers pipeline from a single file")
    parser.add_argument(
        "--push", metavar="REPO", help="upload what was written, with its card, to OWNER/NAME on the hub"
    )
    parser.add_argument("--private", action="store_true", help="a repository that --push makes is private")
    args = parser.parse_args()
    try:
        convert(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def convert(args: argparse.Namespace) -> None:
    """The whole way; ValueError or OSError for what goes wrong."""
    from jdiff.convert import cards, export, hub

    start = time.monotonic()
    export.vacant(args.dest)
    bundle, options = open_source(args)
    for note in bundle.notes:
        print(note)
    for name, part in bundle.parts.items():
        print(f"{name}: {type(part.module).__name__}, {part.parameters():,} parameters, {part.dtype}")
    print(f"{bundle.mapped} of {bundle.total} arrays are parameters")
    for reason in sorted(set(bundle.reasons.values())):
        names = [name for name, why in bundle.reasons.items() if why == reason]
        print(f"  {len(names)} more: {reason} ({names[0]}{', …' if len(names) > 1 else ''})")
    dtype, title = DTYPES.get(args.dtype), Path(args.src).name if Path(args.src).exists() else args.src
    with tqdm(
        total=export.needs(bundle, dtype),
        unit="B",
        unit_scale=True,
        desc="writing",
        leave=False,
        delay=1,
        mininterval=0.5,
    ) as bar:
        report = export.write(bundle, args.dest, args.to, dtype=dtype, title=title, after=bar.update, **options)
    for note in report.notes:
        print(note)
    print(
        f"{report.arrays} arrays written to {args.dest}{f' as {args.dtype}' if args.dtype else ''}, read back and compared"
    )
    for name, digest in report.hashes.items():
        print(f"  sha256 {digest}  {name}")
    if args.push:
        card = cards.card(bundle, report.hashes, title, dtype, component=True)
        print(f"uploaded to {hub.push(args.dest, args.push, card, args.private)}")
    print(f"{time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
