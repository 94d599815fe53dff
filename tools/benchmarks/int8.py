"""A guided DDIM step of a DiT in floats and in integers: on this machine, and by XLA:TPU's estimate on a v5e."""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from benchmarks.devices import over_devices
from benchmarks.timing import Call, Row, alternate, apart, close
from benchmarks.weights import random_dit
from jdiff import quant
from jdiff.plan import bundles, sampling, topology

MACHINE = "v5e:1x1"
TOLERANCES = {"w8a8": 2e-3, "w8": 2e-3}
"""Of a step's result from fp32's, by its largest value: ten times what was found of DiT-S/8 with w8a8."""
INTEGERS = ("w8a8", "w8a8-static")
"""Recipes that are estimated: a static one's steps are any numbers."""


def int8(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of times here, a recipe each, fp32 being the peer; then one of estimated cycles, where libtpu is."""
    asked = args.only.split(",") if args.only else [*TOLERANCES, "tpu"]
    if recipes := [name for name in TOLERANCES if name in asked]:
        yield from _here(args, recipes)
    if "tpu" in asked:
        yield _estimate(args)


def _here(args: argparse.Namespace, recipes: list[str]) -> Iterator[Row]:
    for name in recipes:
        row = {"case": f"{args.model} {name} step b{args.batch}", "error": apart(partial(_check, name), args)}
        sides = {each: partial(_step, None if each == "fp32" else each) for each in (name, "fp32")}
        row |= alternate(sides, args, args.rounds)
        model = jdiff.create(args.model, dtype=jnp.float32)
        for each in (name, "fp32"):
            recipe = None if each == "fp32" else each
            row[f"{each}_params_mb"] = round(quant.size(_made(args, recipe)[1]) / 1e6, 1)
            compiled = sampling.compile_step(model, recipe, args.batch, "cpu:1")
            row[f"{each}_scratch_mb"] = round(compiled.temporary / 1e6, 1)
        yield row


def _made(args: argparse.Namespace, recipe: str | None) -> tuple[Any, Any]:
    """The model and its weights, in floats without a recipe."""
    model = jdiff.create(args.model, dtype=jnp.float32)
    params = random_dit(model)
    return model, quant.quantize(params, quant.find_recipe(recipe)["dit"]) if recipe else params


def _step(recipe: str | None, args: argparse.Namespace) -> Call:
    model, params = _made(args, recipe)
    rng = np.random.default_rng(1)
    shape = (args.batch, model.image_size, model.image_size, model.channels)
    x, y = rng.normal(size=shape).astype(np.float32), rng.integers(0, model.num_classes, args.batch).astype(np.int32)
    step = jax.jit(partial(sampling.ddim_step, model))
    params, rows = over_devices(params, x, y)
    return lambda: step(params, *rows).block_until_ready()


def _check(recipe: str, args: argparse.Namespace) -> float:
    return close(recipe, _step(recipe, args)(), _step(None, args)(), TOLERANCES[recipe])


def _estimate(args: argparse.Namespace) -> Row:
    """bf16 beside both recipes of integers, with guidance, of one chip."""
    row: Row = {"case": f"{args.tpu_model} tpu {MACHINE} b{args.batch}"}
    model = jdiff.create(args.tpu_model, dtype=jnp.bfloat16)
    try:
        with tempfile.TemporaryDirectory() as folder:
            bundles.record(Path(folder))
            sides = {
                name: sampling.compile_step(model, recipe, args.batch, MACHINE, jnp.bfloat16, Path(folder))
                for name, recipe in {"bf16": None, **{name: name for name in INTEGERS}}.items()
            }
    except ValueError as error:
        return row | {"skipped": str(error)}
    chip = topology.parse(MACHINE).chip
    assert chip.peak is not None and chip.flops_per_cycle is not None
    for name, made in sides.items():
        row[f"{name}_cycles"] = made.program.cycles
        row[f"{name}_estimated_ms"] = round(made.program.cycles * chip.flops_per_cycle / chip.peak * 1e3, 2)
        row[f"{name}_kernel_cycles"] = sum(x.cycles for x in made.program.scheduled if x.instruction.steps)
        row[f"{name}_share_estimated"] = round(made.program.share_estimated, 3)
        row[f"{name}_params_mb"] = round(made.params / 1e6, 1)
    for name in INTEGERS:
        row[f"{name}_integer_products"] = sides[name].program.products["s8", "s8", "s32"]
        row[f"{name}_estimated_speedup"] = round(sides["bf16"].program.cycles / sides[name].program.cycles, 3)
        row[f"{name}_hottest"] = [(x.cycles, x.instruction.source[-60:]) for x in sides[name].program.hottest(8)]
    return row
