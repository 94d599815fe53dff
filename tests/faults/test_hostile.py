"""Files made to do harm, or changed at random, through every reader: nothing runs, nothing crashes, one line says what is wrong."""

import io
import json
import random
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_convert_hostile import CANARY, FOUR, PICKLES, Reduce, archive, fuzzed, quiet
from test_corruption import PART, save_copy

from jdiff import data
from jdiff.convert import bundle, files, lora_file, quantized
from jdiff.data.latents import FORMAT, Latents
from jdiff.data.packed import Texts
from jdiff.diffusion import schedulers
from jdiff.evaluate import kept
from jdiff.evaluate.pictures import batches, moments_of, open_pictures
from jdiff.pipelines.kept import file_of, keep
from jdiff.tokens import Tokenizer

__all__ = ["quiet"]
PLAIN = (ValueError, OSError, FloatingPointError)
"""What a command says in one line."""
RNG = np.random.default_rng(0)


def make_npz(folder):
    np.savez(
        folder / "a.npz", arr_0=RNG.integers(0, 256, (4, 6, 6, 3), dtype=np.uint8), prompt=np.array(["a", "b"] * 2)
    )


def read_npz(folder):
    pictures = open_pictures(str(folder / "a.npz"), 0)
    return [*batches(pictures)], pictures.prompts


def make_moments(folder):
    np.savez(folder / "a.npz", mu=np.zeros(5), sigma=np.eye(5), count=9, title="a", network="b")


def make_latents(folder):
    meta = {"format": FORMAT, "shape": (2, 2, 3), "class_names": ["a"], "fingerprint": "f", "scaling_factor": 1.0}
    meta |= {"shard_counts": [4], "preview": np.zeros((4, 3)).tolist(), "captions": True}
    (folder / "meta.json").write_text(json.dumps(meta))
    np.save(folder / "moments-00000.npy", np.zeros((4, 2, 2, 2, 6), np.float32))
    np.save(folder / "labels.npy", np.zeros(4, np.int32))
    Texts([["a"], ["b", "c"], ["d"], ["e"]]).save(folder / "captions.npz")


def read_latents(folder):
    source = Latents(str(folder))
    return [source.read(i, False, np.random.default_rng(0)) for i in range(len(source))]


def make_picture(kind):
    def make(folder):
        (folder / "ant").mkdir()
        Image.fromarray(RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / "ant" / f"a.{kind}")

    return make


def read_pictures(folder):
    source = data.open_source("imagefolder", path=str(folder), image_size=8)
    try:
        return source.read(0, False, np.random.default_rng(0))
    except data.BrokenRecord as error:  # which costs one picture
        raise ValueError(error.reason) from error


def make_captions(folder):
    make_picture("png")(folder)
    rows = [{"file_name": "ant/a.png", "text": "a fox"}, {"file_name": "ant/a.png", "text": ["b", "c"]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def read_captions(folder):
    source = data.open_source("captions", path=str(folder), image_size=8)
    try:
        return [source.read(i, False, np.random.default_rng(0)) for i in range(len(source))]
    except data.BrokenRecord as error:
        raise ValueError(error.reason) from error


def make_features(folder):
    keep(file_of(folder, 0, "npz"), {}, lambda file: np.savez(file, allow_pickle=False, **PART))


def make_scheduler(folder):
    config = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    config |= {"beta_schedule": "scaled_linear", "steps_offset": 1, "skip_prk_steps": True}
    (folder / "scheduler_config.json").write_text(json.dumps(config))


def make_copy(folder):
    save_copy(folder / "copy")


READERS = {
    "pictures.npz": (make_npz, read_npz),
    "moments.npz": (make_moments, lambda folder: moments_of(str(folder / "a.npz"))),
    "latents": (make_latents, read_latents),
    "png": (make_picture("png"), read_pictures),
    "jpg": (make_picture("jpg"), read_pictures),
    "webp": (make_picture("webp"), read_pictures),
    "gif": (make_picture("gif"), read_pictures),
    "captions": (make_captions, read_captions),
    "features": (make_features, lambda folder: [*kept._read(folder, [*PART])]),
    "tokenizer": (
        lambda folder: Tokenizer.train(["a red fox"] * 3, 530).save(folder / "words"),
        lambda folder: Tokenizer.from_folder(folder / "words")(["a red fox"]),
    ),
    "scheduler": (
        make_scheduler,
        lambda folder: schedulers.from_config(files.read_json(folder / "scheduler_config.json")),
    ),
    "quantized copy": (make_copy, lambda folder: quantized.read(folder / "copy")),
}


def pickled_array():
    """An .npy of objects, which NumPy would unpickle where it is let."""
    file = io.BytesIO()
    np.save(file, np.array([Reduce()], object), allow_pickle=True)
    return file.getvalue()


def lying_array(shape):
    """An .npy that claims to be of any shape."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)


ARRAYS = {
    "pickled": pickled_array,
    "of 2**60 numbers": lambda: lying_array((2**60,)),
    "of 2**40 numbers": lambda: lying_array((2**20, 2**20)),
    "of negative size": lambda: lying_array((-1, 4)),
    "of code": lambda: lying_array("__import__('os').system('touch " + CANARY + "')"),
    "empty": lambda: b"",
}


def refused_or_read(read):
    """Whether it was refused, in a line; anything but that and a value is a failure."""
    try:
        read()
    except PLAIN as error:
        assert str(error) and "\n" not in str(error), repr(error)
        return True
    return False


@pytest.mark.parametrize("name", READERS)
def test_changed_files_are_read_or_refused(name, quiet, request, record_property):
    make, read = READERS[name]
    folder = quiet / "files"
    folder.mkdir()
    make(folder)
    assert not refused_or_read(lambda: read(folder)), "the fuzzing starts from something that works"
    long, rng = "faults" in request.config.getoption("markexpr").replace("not faults", ""), random.Random(name)
    paths, refused, count = sorted(p for p in folder.rglob("*") if p.is_file()), 0, 60 if long else 12
    for _ in range(count):
        path = rng.choice(paths)
        good = path.read_bytes()
        path.unlink()
        path.write_bytes(fuzzed(good, rng, 0, rng.choice([200, len(good)])))
        refused += refused_or_read(lambda: read(folder))
        path.unlink()
        path.write_bytes(good)
    record_property("fault", [f"{count} changed files: {name}", "read, or one line", f"{refused} refused"])


@pytest.mark.parametrize("what", ARRAYS)
def test_hostile_arrays_are_refused(what, quiet):
    content = ARRAYS[what]()
    for make, read, names in (
        (make_npz, read_npz, ["arr_0", "prompt"]),
        (make_moments, READERS["moments.npz"][1], ["mu", "sigma", "count"]),
    ):
        for name in names:
            make(quiet)
            with zipfile.ZipFile(quiet / "a.npz") as file:
                members = {member: file.read(member) for member in file.namelist()}
            with zipfile.ZipFile(quiet / "a.npz", "w") as file:
                for member, own in members.items():
                    file.writestr(member, content if member == f"{name}.npy" else own)
            assert refused_or_read(lambda read=read: read(quiet)), name
    make_latents(quiet)
    for path in sorted(quiet.glob("*.npy")):
        good = path.read_bytes()
        path.write_bytes(content)
        assert refused_or_read(lambda: read_latents(quiet)), path.name
        path.write_bytes(good)


@pytest.mark.runs
def test_every_pickle_is_refused_at_every_door(quiet, record_property):
    """As a checkpoint, a component's weights, a network's, a LoRA, and under the name of a safetensors file."""
    folder, count = quiet / "text_encoder", 0
    folder.mkdir()
    config = {"model_type": "clip_text_model", "num_attention_heads": 8}
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in PICKLES.items():
        zipped = archive(content, FOUR)
        doors = {
            "a.ckpt": (zipped, lambda: bundle.read(quiet / "a.ckpt")),
            "a.pth": (zipped, lambda: files.read_arrays([quiet / "a.pth"])),
            "lora.bin": (zipped, lambda: lora_file.read(quiet / "lora.bin")),
            "lora.safetensors": (content, lambda: lora_file.read(quiet / "lora.safetensors")),
            "text_encoder/pytorch_model.bin": (zipped, lambda: bundle.read(folder)),
        }
        for place, (written, read) in doors.items():
            (quiet / place).write_bytes(written)
            assert refused_or_read(read), (name, place)
            (quiet / place).unlink()
            count += 1
    record_property("fault", [f"{count} hostile pickles", "none runs, one line", "so"])
    assert count >= 500
