"""A quantized model for other runtimes and chips: its integers, and what each of its products made of one batch.

A folder that is read with any safetensors library, without jdiff; docs/int8.md says what each array is.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import models, qtensor, quant, weights
from jdiff.convert import export, tensors
from jdiff.evaluate.calibration import at_levels, output, predict
from jdiff.evaluate.subject import Subject
from jdiff.pipelines import gather
from jdiff.qtensor import QTensor, Window
from jdiff.version import __version__

FORMAT = 1


def write(dest: Path, subject: Subject, seed: int = 0) -> dict[str, str]:
    """Writes the folder, which must not exist; it appears when it is whole. Returns sha256 by file.

    The batch is noise, a row for each of what the subject is asked, of the smallest size that its model takes.
    ConversionError when dest exists; ValueError for a model without a quantized kernel.
    """
    params = weights.flatten(subject.params)
    paths = [path for path, leaf in params.items() if isinstance(leaf, QTensor)]
    if not paths:
        raise ValueError("no kernel of this model is quantized: make a copy with tools/quantize.py first")
    export.vacant(dest)
    shape = subject.model.dummy_inputs(len(subject.y))[0].shape
    batch = at_levels(subject, np.random.default_rng(seed).normal(size=shape).astype(np.float32), seed)
    run = partial(predict, subject.model)
    look = jax.jit(lambda params, batch: quant.observe(partial(run, batch=batch), params, paths, _inputs))
    found = jax.tree.map(gather, jax.block_until_ready(look(subject.params, batch)))
    arrays = {path: np.asarray(leaf) for path, leaf in params.items() if not isinstance(leaf, QTensor)}
    golden = {f"model/{name}": gather(x) for name, x in batch.items()}
    golden["model/output"] = gather(output(subject.model, subject.params, batch))
    products = []
    for path in paths:
        kernel, seen = params[path], found[path]
        for layer in range(kernel.shape[0]) if len(kernel.shape) % 2 else [None]:
            w, x, numbers = jax.tree.map(
                lambda a, i=layer: a if i is None else a[i], (kernel, seen["x"], seen["window"])
            )
            name = path.removesuffix("/kernel") + ("" if layer is None else f"/{layer}")
            arrays |= {f"{name}/{part}": array for part, array in _kernel(w).items()}
            window = _window(numbers)
            made = _product(window, jnp.asarray(x), w)
            golden |= {f"{name}/{part}": array for part, array in made.items()}
            products.append({"name": name, "kernel": path, "layer": layer, **_facts(window, w, "accumulator" in made)})
    with export.whole(dest) as partial_dest:
        partial_dest.mkdir()
        files = {"model.safetensors": arrays, "golden.safetensors": golden}
        sums = {file: tensors.write(partial_dest / file, held, {}) for file, held in files.items()}
        index = {"format": FORMAT, "jdiff_version": __version__, "model": models.describe(subject.model)}
        index |= {"seed": seed, "sha256": sums, "products": products}
        (partial_dest / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return sums


def _inputs(window: Window, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    """What `quant.observe` is to keep: the inputs, and the window in numbers."""
    return {
        "x": x.astype(jnp.float32),
        "window": jnp.asarray([] if window is None else jax.tree.leaves(window), jnp.float32),
    }


def _window(numbers: np.ndarray) -> Window:
    if not len(numbers):
        return None
    a, b, top, bottom, left, right = (int(n) for n in numbers)
    return (a, b), ((top, bottom), (left, right))


def _kernel(w: QTensor) -> dict[str, np.ndarray]:
    scale = np.asarray(w.scale)
    return {
        "weight": np.asarray(w.qvalue).astype(np.int8),
        "scale": scale,
        "zero_point": np.zeros(scale.shape, np.int8),
    }


def _facts(window: Window, w: QTensor, integer: bool) -> dict[str, Any]:
    rows = w.scale.shape[-2]
    facts: dict[str, Any] = {
        "operation": "product" if window is None else "convolution",
        "bits": 4 if w.qvalue.dtype == jnp.int4 else 8,
        "parts": list(w.sizes) or [w.shape[-2] // rows] * rows,
        "activations": "float32" if not integer else "int8" if w.step is None else "int8, static",
    }
    return facts if window is None else {**facts, "strides": window[0], "padding": window[1]}


def _product(window: Window, x: jax.Array, w: QTensor) -> dict[str, np.ndarray]:
    """One product's golden arrays."""
    output = qtensor.dot(x, w) if window is None else qtensor.conv(x, w, *window)
    if not qtensor.is_integer(window, w):
        return {"input": np.asarray(x), "output": np.asarray(output)}
    x_s8, steps, sums, _ = zip(*qtensor.integer_parts(window, x, w), strict=True)
    scale = jnp.stack(steps)
    made = {
        "input": jnp.concatenate(x_s8, -1),
        "input_scale": scale,
        "input_zero_point": jnp.zeros(scale.shape, jnp.int8),
    }
    made |= {"accumulator": jnp.stack(sums), "output": output}
    return {name: np.asarray(array) for name, array in made.items()}
