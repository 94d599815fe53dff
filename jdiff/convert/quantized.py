"""jdiff's own format of quantized checkpoints: a folder of quantized.json, which says everything, a safetensors file a model, and
a text model's tokenizer/.

quantized.json: `format`, `jdiff_version`, `recipe`, `balanced`, `models` (name -> `models.describe`), `kernels` (model -> path ->
{"bits", "integer", "sizes"}: see `QTensor`), `digests` (model -> fingerprint of what it was before), `sha256` (file -> sum),
`facts`: what a pipeline takes besides, the caller's, and `self`, the digest of all that. A kernel at PATH is two arrays,
PATH/qvalue and PATH/scale, and a third, PATH/step, where the activations' is static; what is not quantized is one, at PATH.
Integers of 4 bits are two to a byte, neighbours of the input axis, the first in the low half.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jdiff import models, quant, tree, weights
from jdiff.convert import engine, export, files, tensors
from jdiff.convert.arrays import Lazy
from jdiff.convert.rows import refuse
from jdiff.paths import whole
from jdiff.qtensor import QTensor
from jdiff.tokens import Tokenizer
from jdiff.version import __version__

FORMAT = 2
Models = dict[str, tuple[Any, Any]]


def write(
    dest: str | Path,
    found: Models,
    record: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    after: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Writes models, (module, params) by name, to a folder that must not exist; it appears when it is whole, read back.

    record: `recipe`, `balanced`, `digests` and `facts`. after: called with the bytes of each array written. Returns sha256 by file.
    ConversionError when dest exists, or params hold adapters.
    """
    dest = Path(dest)
    export.vacant(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "jdiff_version": __version__, **record, "kernels": {}, "sha256": {}}
    content["models"] = {name: models.describe(module) for name, (module, _) in found.items()}
    with whole(dest) as partial:
        partial.mkdir()
        for name, (_, params) in found.items():
            arrays, content["kernels"][name] = _flat(params)
            file = f"{name}.safetensors"
            content["sha256"][file] = tensors.write(partial / file, arrays, {"format": "jdiff"}, after=after)
        if tokenizer is not None:
            tokenizer.save(partial / "tokenizer")
        content = json.loads(json.dumps(content))
        text = json.dumps({**content, "self": tree.digest(content)}, indent=1)
        (partial / files.QUANTIZED).write_text(text + "\n", encoding="utf-8")
    return content["sha256"]


def _flat(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by name, kernels by path) of one model."""
    arrays, kernels = {}, {}
    for path, leaf in weights.flatten(params).items():
        if isinstance(leaf, QTensor):
            bits = 4 if leaf.qvalue.dtype == jnp.int4 else 8
            kernels[path] = {"bits": bits, "integer": leaf.integer, "sizes": list(leaf.sizes)}
            arrays[f"{path}/qvalue"] = _packed(np.asarray(leaf.qvalue)) if bits == 4 else np.asarray(leaf.qvalue)
            arrays[f"{path}/scale"] = np.asarray(leaf.scale)
            if leaf.step is not None:
                arrays[f"{path}/step"] = np.asarray(leaf.step)
        elif weights.is_weight(leaf):
            raise refuse(f"{path} has adapters attached: merge them first (tools/lora.py merge)")
        else:
            arrays[path] = leaf if isinstance(leaf, Lazy) else np.asarray(leaf)
    return arrays, kernels


def _packed(values: np.ndarray) -> np.ndarray:
    """int4 (…, C, D) -> uint8 (…, C / 2, D)."""
    low, high = (values[..., i::2, :].astype(np.uint8) & 15 for i in (0, 1))
    return low | high << 4


class Unpacked(Lazy):
    """Undoes `_packed`, when it is asked for."""

    def __init__(self, packed: np.ndarray):
        super().__init__([packed])
        *lead, rows, D = packed.shape
        self.shape = (*lead, 2 * rows, D)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.int4)

    def _fill(self, out: np.ndarray) -> None:
        packed = np.asarray(self.parts[0])
        for i, half in enumerate((packed & 15, packed >> 4)):
            out[..., i::2, :] = (half ^ 8).astype(np.int8) - 8


def read(folder: Path) -> tuple[Models, dict[str, Any]]:
    """((module, params) by name, params views of their files; quantized.json's content).

    ConversionError when a file is missing, is not what was written, or does not hold the model that its record describes.
    """
    content = files.read_json(folder / files.QUANTIZED)
    if content.get("format") != FORMAT:
        raise refuse(
            f"{folder} has the format {content.get('format')}, not {FORMAT}: use jdiff {content.get('jdiff_version')}"
        )
    if content.pop("self", None) != tree.digest(content):
        raise refuse(f"{folder / files.QUANTIZED} is damaged: it is not what was written")
    found: Models = {}
    try:
        for name, record in content["models"].items():
            file = folder / f"{name}.safetensors"
            if not file.is_file():
                raise refuse(f"{folder} lacks {file.name}")
            with open(file, "rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != content["sha256"][file.name]:
                    raise refuse(f"{file} is damaged: it is not what was written")
            module = models.build(record)
            found[name] = module, _tree(file, module, tensors.read(file)[0], content["kernels"][name])
    except (KeyError, TypeError, AttributeError) as error:
        raise refuse(f"{folder / files.QUANTIZED} lacks what it should hold: {error!r}") from error
    return found, content


def _tree(file: Path, module: Any, arrays: dict[str, np.ndarray], kernels: Mapping[str, Any]) -> Any:
    engine.plausible(module, arrays)
    leaves: dict[str, Any] = dict(arrays)
    for path, how in kernels.items():
        qvalue, scale = (leaves.pop(f"{path}/{part}") for part in ("qvalue", "scale"))
        settings = how["integer"], tuple(how["sizes"]), leaves.pop(f"{path}/step", None)
        leaves[path] = QTensor(Unpacked(qvalue) if how["bits"] == 4 else qvalue, scale, *settings)
    expected = tree.flatten(engine.shapes(module))
    wrong = [path for path in {**expected, **leaves} if not _fits(expected.get(path), leaves.get(path))]
    if wrong:
        raise refuse(
            f"{file} does not hold its {type(module).__name__}: {len(wrong)} arrays differ, the first {wrong[0]}"
        )
    return tree.nested({path: leaves[path] for path in expected})


def _fits(expected: Any, leaf: Any) -> bool:
    return expected is not None and leaf is not None and tuple(expected.shape) == tuple(leaf.shape)


def size(found: Models) -> int:
    """Bytes of all models' arrays in their files."""
    return sum(quant.size(params) for _, params in found.values())
