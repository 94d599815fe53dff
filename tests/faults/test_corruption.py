"""A file that was changed after it was written is found, or what it holds is still what was saved: no bit flip goes unseen.

Of what jdiff writes and reads again: checkpoints, quantized copies, features kept of a scoring, tokenizers, the hub's cache.
Others' formats carry no hash, and a flip within an array's bytes there cannot be seen by any reader.
"""

import dataclasses
import hashlib
import logging
import random
import shutil

import jax
import numpy as np
import pytest
from test_checkpoint import FACTS, TARGET, make_items
from test_convert_hostile import fuzzed

from jdiff import checkpoint, loading, models, tree
from jdiff.convert import hub, quantized
from jdiff.evaluate import kept
from jdiff.pipelines.kept import file_of, keep
from jdiff.quant import find_recipe, quantize
from jdiff.tokens import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
PLAIN = (ValueError, OSError)
"""What a command says in one line."""


def save_checkpoint(folder):
    with checkpoint.Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(1, make_items(1), FACTS)


def read_checkpoint(folder):
    meta = checkpoint.read_meta(folder, 1)
    return tree.flatten(checkpoint.restore(folder, 1, TARGET, meta)) | {"meta": repr(sorted(meta.items()))}


def save_copy(folder):
    model = models.create("DiT-S/2", image_size=8, channels=3, num_classes=2, width=64, depth=2, heads=2)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0), *model.dummy_inputs())["params"])
    opened = loading.Opened({"dit": (model, quantize(params, find_recipe("w8a8")["dit"]))}, "dit")
    how = loading.Quantized("w8a8", {})
    loading.save_quantized(dataclasses.replace(opened, quantized=how), folder)


def read_copy(folder):
    found, content = quantized.read(folder)
    return tree.flatten(found["dit"][1]) | {"record": repr(content), "model": repr(found["dit"][0])}


PART = {"pool_ND": np.arange(96, dtype=np.float32).reshape(8, 12), "logits_NK": np.ones((8, 5), np.float32)}


def save_features(folder):
    folder.mkdir()
    keep(file_of(folder, 0, "npz"), {}, lambda file: np.savez(file, allow_pickle=False, **PART))


def read_features(folder):
    parts = [*kept._read(folder, [*PART])]
    if not parts:
        raise ValueError("damaged, and made again")
    return parts[0]


def save_tokenizer(folder):
    Tokenizer.train(["a red fox", "an old house"] * 3, 530).save(folder)


def read_tokenizer(folder):
    return {"fingerprint": Tokenizer.from_folder(folder).fingerprint}


def save_download(folder):
    folder.mkdir()
    data = random.Random(0).randbytes(3000)
    (folder / hashlib.sha256(data).hexdigest()).write_bytes(data)


def read_download(folder):
    hub.check([*folder.iterdir()])
    return {}


STORES = {
    "checkpoint": (save_checkpoint, read_checkpoint),
    "quantized copy": (save_copy, read_copy),
    "kept features": (save_features, read_features),
    "tokenizer": (save_tokenizer, read_tokenizer),
    "download": (save_download, read_download),
}
ALL = 400
"""Corruptions in the long run, over all stores."""


def corrupt(name, folder, count):
    """(found, harmless) of so many random corruptions of one file each: a bit, a byte, a few, cut short, emptied, deleted."""
    save, read = STORES[name]
    save(folder / "saved")
    saved, rng, found, harmless = read(folder / "saved"), random.Random(f"{name} {count}"), 0, 0
    files = [p.relative_to(folder / "saved") for p in sorted((folder / "saved").rglob("*")) if p.is_file()]
    sizes = [1 + (folder / "saved" / file).stat().st_size ** 0.5 for file in files]
    for _ in range(count):
        copy = folder / "copy"
        shutil.copytree(folder / "saved", copy)
        file = copy / rng.choices(files, sizes)[0]
        data, how = file.read_bytes(), rng.choice(["bit", "bit", "byte", "few", "half", "empty", "gone"])
        at = rng.randrange(max(1, len(data)))
        changed = {
            "bit": data[:at] + bytes(b ^ 1 << rng.randrange(8) for b in data[at : at + 1]) + data[at + 1 :],
            "byte": data[:at] + bytes(b ^ 0x55 for b in data[at : at + 1]) + data[at + 1 :],
            "few": fuzzed(data, rng) if data else b"",
            "half": data[: len(data) // 2],
        }
        file.unlink()
        if how != "gone":
            file.write_bytes(changed.get(how, b""))
        try:
            values = read(copy)
        except PLAIN as error:
            assert "\n" not in str(error), (name, file, how)
            found += 1
        else:
            assert values.keys() == saved.keys(), (name, file, how)
            for key, value in saved.items():
                assert np.array_equal(values[key], value), (name, file, how, at, key)
            harmless += 1
        shutil.rmtree(copy)
    return found, harmless


@pytest.mark.parametrize("name", STORES)
def test_a_few_corruptions_are_found_or_harmless(name, tmp_path, caplog):
    with caplog.at_level(logging.CRITICAL):
        found, _ = corrupt(name, tmp_path, 12)
    assert found >= 2


@pytest.mark.faults
@pytest.mark.parametrize("name", STORES)
def test_corruptions_are_found_or_harmless(name, tmp_path, record_property):
    found, harmless = corrupt(name, tmp_path, ALL // len(STORES))
    record_property(
        "fault", [f"{ALL // len(STORES)} corruptions: {name}", "found or harmless", f"{found} + {harmless}"]
    )
    assert found > ALL // len(STORES) // 4
