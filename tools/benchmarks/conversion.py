"""A DiT's checkpoint at full size: read into memory and written again, beside diffusers, and from one format into another."""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from benchmarks.timing import Call, Row, beside_torch, close, turns
from benchmarks.weights import random_dit
from jdiff import convert

FOLDER, FILE = "diffusers", "dit.pt"


def conversions(args: argparse.Namespace) -> Iterator[Row]:
    """What is read is added up, since PyTorch only maps a file until then. jdiff reads back what it wrote and compares it;
    diffusers does not."""
    with tempfile.TemporaryDirectory(dir=args.path) as made:
        at = argparse.Namespace(**vars(args) | {"made": made})
        module = jdiff.create(args.model)
        bundle = convert.from_models({"dit": (module, jax.tree.map(np.asarray, random_dit(module)))})
        convert.write(bundle, Path(made, FOLDER), "diffusers")
        convert.write(bundle, Path(made, FILE), "dit")
        del bundle
        parts = {
            "load": (load, torch_load, check_load),
            "rewrite": (partial(rewrite, FOLDER, "diffusers"), torch_rewrite, check_load),
        }
        asked = args.only.split(",") if args.only else [*parts, "formats"]
        for name, (ours, theirs, check) in parts.items():
            if name in asked:
                yield beside_torch(f"{args.model} {name}", ours, theirs, check, at, args.rounds)
        if "formats" in asked:
            for source, to in ((FILE, "diffusers"), (FOLDER, "dit")):
                row = turns({"jdiff": partial(rewrite, source, to)}, at, args.rounds)
                yield {"case": f"{args.model} {source} to {to}", **row}


def load(args: argparse.Namespace) -> Call:
    def loaded() -> Any:
        _, params = jdiff.load(Path(args.made, FOLDER))
        for x in jax.tree.leaves(params):
            float(jnp.sum(x))
        return params

    return loaded


def torch_load(args: argparse.Namespace) -> Call:
    from diffusers import DiTTransformer2DModel

    def loaded() -> Any:
        peer = DiTTransformer2DModel.from_pretrained(Path(args.made, FOLDER))
        for x in peer.state_dict().values():
            float(x.sum())
        return peer

    return loaded


def check_load(args: argparse.Namespace) -> float:
    """By one kernel of the last block."""
    found = load(args)()["blocks"]["attn"]["proj"]["kernel"][-1]
    expected = torch_load(args)().transformer_blocks[-1].attn1.to_out[0].weight
    return close("load", found.T, expected.detach().numpy(), 0.0)


def rewrite(source: str, to: str, args: argparse.Namespace) -> Call:
    dest = Path(args.made, "out.pt" if to == "dit" else "out")

    def written() -> None:
        convert.write(convert.read(Path(args.made, source)), dest, to)
        shutil.rmtree(dest) if dest.is_dir() else dest.unlink()

    return written


def torch_rewrite(args: argparse.Namespace) -> Call:
    from diffusers import DiTTransformer2DModel

    def written() -> None:
        dest = Path(args.made, "theirs")
        DiTTransformer2DModel.from_pretrained(Path(args.made, FOLDER)).save_pretrained(dest)
        shutil.rmtree(dest)

    return written
