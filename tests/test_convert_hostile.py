"""Files made to do harm, or only broken: refused in one line, nothing runs, nothing large is allocated, nothing crashes."""

import io
import json
import pickle
import random
import struct
import tarfile
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save as save_safetensors

from jdiff import convert
from jdiff.convert import bundle, files, tensors, torchfile

CANARY = "jdiff-canary"


def archive(data, records=(), folder="archive", compression=zipfile.ZIP_STORED, order=b"little"):
    """A zip as torch.save lays it out, around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made:
        for name, content in [("data.pkl", data), ("byteorder", order), *records, ("version", b"3\n")]:
            made.writestr(f"{folder}/{name}", content)
    return buffer.getvalue()


def text(x):
    return b"X" + struct.pack("<I", len(x)) + x.encode()


def call(name, args=None):
    """Protocol 2: the global, its arguments, REDUCE."""
    args = b"(" + text(f"touch {CANARY}") + b"t" if args is None else args
    return b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n" + args + b"R."


GLOBALS = (
    *(
        "os system",
        "posix system",
        "nt system",
        "os popen",
        "os execv",
        "os remove",
        "os.path join",
        "subprocess Popen",
    ),
    *(
        "subprocess check_output",
        "builtins eval",
        "builtins exec",
        "builtins getattr",
        "builtins __import__",
        "builtins open",
    ),
    *(
        "__builtin__ eval",
        "__builtin__ getattr",
        "builtins compile",
        "io open",
        "importlib import_module",
        "runpy run_path",
    ),
    *("operator attrgetter", "operator methodcaller", "functools partial", "types FunctionType", "types CodeType"),
    *("pickle loads", "_pickle loads", "marshal loads", "shutil rmtree", "ctypes CDLL", "socket create_connection"),
    *(
        "pty spawn",
        "timeit timeit",
        "code interact",
        "webbrowser open",
        "pathlib Path",
        "tempfile mktemp",
        "zipfile ZipFile",
    ),
    *("torch load", "torch.hub load", "torch.jit load", "torch.ops load_library", "torch.serialization load"),
    *(
        "torch.storage _load_from_bytes",
        "torch._utils _rebuild_wrapper_subclass",
        "torch._tensor _rebuild_from_type_v2",
    ),
    *("torch.utils._config_module load_config", "torch.nn Linear", "torch.FloatStorage __reduce__", "torch from_file"),
    *("numpy load", "numpy fromfile", "numpy memmap", "numpy.core.multiarray _reconstruct", "numpy.testing runstring"),
    *("numpy.distutils.exec_command exec_command", "numpy ndarray", "jax.numpy array", "collections Counter"),
    *("collections OrderedDict.__init__", "argparse Namespace.__init__", "argparse FileType", "codecs decode"),
    *("jdiff.convert.torchfile read", "copyreg _reconstructor", "copyreg __newobj__", "builtins set.__init__"),
)


class Reduce:
    """What an ordinary attacker writes."""

    def __init__(self, protocol=2):
        self.protocol = protocol

    def __reduce__(self):
        import os

        return os.system, (f"touch {CANARY}",)


def nested():
    """The call deep inside a state dict, beside good tensors."""
    return {"model": {"blocks": [{"weight": 1.0, "bias": Reduce()}]}, "ema": {}}


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")


def tensor(numel=b"K\x04", offset=b"K\x00", size=b"K\x04\x85", stride=b"K\x01\x85", storage=STORAGE):
    """A state dict of one tensor, any of whose numbers may lie."""
    body = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage[1:] + numel + b"tQ" + offset + size + stride
    return b"\x80\x02}" + text("a") + body + b"\x89}tRs."


def long(x):
    data = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


FOUR = [("data/0", np.arange(4, dtype=np.float32).tobytes())]
PICKLES = {
    **{f"calls {name}": call(name) for name in GLOBALS},
    **{f"protocol {n}": pickle.dumps(Reduce(), n) for n in range(6)},
    **{f"nested, protocol {n}": pickle.dumps(nested(), n) for n in (2, 4)},
    "as a key": b"\x80\x02}cos\nsystem\nK\x01s.",
    "not called": b"\x80\x02cos\nsystem\n.",
    "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93(" + text(f"touch {CANARY}") + b"tR.",
    "INST": b"(" + f"S'touch {CANARY}'\n".encode() + b"ios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\n" + text(f"touch {CANARY}") + b"o.",
    "NEWOBJ": b"\x80\x02cos\nsystem\n(" + text(f"touch {CANARY}") + b"t\x81.",
    "NEWOBJ_EX": b"\x80\x04" + text("os") + text("system") + b"\x93(" + text("x") + b"t}\x92.",
    "EXT1": b"\x80\x02\x82\x01)R.",
    "EXT2": b"\x80\x02\x83\x01\x00)R.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00)R.",
    "BUILD of a name": b"\x80\x02cargparse\nNamespace\n}" + text("__class__") + text("x") + b"sb.",
    "BUILD of a list": b"\x80\x02]}" + text("__setstate__") + text("x") + b"sb.",
    "a call of a storage type": b"\x80\x02ctorch\nFloatStorage\nK\x0a\x85R.",
    "a call of an inert class": b"\x80\x02cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n)R.",
    "a name with newlines": b"\x80\x04" + text("collections OrderedDict\nos") + text("system") + b"\x93)R.",
    "a name that is no text": b"\x80\x04K\x01K\x02\x93.",
    "text persistent id": b"P../../etc/passwd\n.",
    "persistent id of a path": b"\x80\x02" + text("../../etc/passwd") + b"Q.",
    "storage of a path": tensor(storage=STORAGE.replace(text("0"), text("../0"))),
    "storage that is missing": tensor(storage=STORAGE.replace(text("0"), text("7"))),
    "storage longer than its bytes": tensor(numel=b"K\x05"),
    "storage of 2**60 numbers": tensor(numel=long(2**60)),
    "storage of a negative length": tensor(numel=long(-4)),
    "tensor longer than its storage": tensor(size=b"K\x05\x85"),
    "tensor of 2**40 numbers by stride 0": tensor(size=long(2**40) + b"\x85", stride=b"K\x00\x85"),
    "tensor past the end by offset": tensor(offset=b"K\x01"),
    "tensor before the start": tensor(offset=long(-1)),
    "tensor past the end by stride": tensor(size=b"K\x02\x85", stride=b"K\x04\x85"),
    "negative stride": tensor(size=b"K\x02\x85", stride=long(-1) + b"\x85"),
    "negative size": tensor(size=long(-4) + b"\x85"),
    "size and stride of other ranks": tensor(size=b"K\x02K\x02\x86"),
    "a size of floats": tensor(size=b"G?\xf0\x00\x00\x00\x00\x00\x00\x85"),
    "many dimensions": tensor(size=b"(" + b"K\x01" * 70 + b"t", stride=b"(" + b"K\x01" * 70 + b"t"),
    "a storage that is a list": tensor(storage=b"(]"),
    "a name twice": b"\x80\x02}" + text("a") + b"K\x01s" + text("a") + b"K\x02s.",
    "a key of tuples 200,000 deep": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dict in itself": b"\x80\x02}q\x00" + text("ema") + b"h\x00s" + text("model") + b"h\x00s.",
    "lists 200,000 deep": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "an empty stack": b"\x80\x02R.",
    "no mark": b"\x80\x02t.",
    "a mark for a value": b"\x80\x02((.",
    "an unknown memo": b"\x80\x02h\x07.",
    "no end": b"\x80\x02}",
    "more after the end": b"\x80\x02}.}.",
    "two objects": b"\x80\x02}}.",
    "a length beyond the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "nothing": b"",
    "no pickle": b"hello, world",
    "an OrderedDict of a dict": b"\x80\x02ccollections\nOrderedDict\n}\x85R.",
    "bytes by codec": call("_codecs encode", b"(" + text("x") + text("hex") + b"t"),
    "a dtype of objects": call("numpy dtype", b"(" + text("O8") + b"t"),
    "a scalar of another size": call(
        "numpy.core.multiarray scalar", b"(cnumpy\ndtype\n" + text("f8") + b"\x85RC\x01xt"
    ),
    "a number": b"\x80\x02K\x01.",
}


def tar(data):
    """PyTorch's format before 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name in ("pickle", "storages", "tensors", "sys_info"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def double(first, second, name="archive/data.pkl"):
    """A zip with one name twice, which another reader might resolve the other way."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made, pytest.warns(UserWarning, match="Duplicate"):
        made.writestr(name, first)
        made.writestr(name, second)
    return buffer.getvalue()


def over_one_another():
    """Many entries that share one range of bytes."""
    data = archive(tensor(), FOUR)
    with zipfile.ZipFile(io.BytesIO(data)) as made:
        where = made.getinfo("archive/data/0").header_offset
    out = bytearray(data)
    place = out.find(b"PK\x01\x02", out.find(b"PK\x01\x02") + 4)
    out[place + 42 : place + 46] = struct.pack("<I", where)
    return bytes(out)


GOOD = tensor()
FILES = {
    "a compressed bomb": lambda: archive(GOOD, [("data/0", bytes(50_000_000))], compression=zipfile.ZIP_DEFLATED),
    "a compressed pickle": lambda: archive(GOOD + bytes(1_000_000), FOUR, compression=zipfile.ZIP_BZIP2),
    "a path upwards": lambda: archive(GOOD, [*FOUR, ("../../evil", b"x")]),
    "an absolute path": lambda: archive(GOOD, [*FOUR, ("/etc/passwd", b"x")]),
    "backslashes": lambda: archive(GOOD, [*FOUR, ("..\\evil", b"x")]),
    "one name twice": lambda: double(GOOD, call("os system")),
    "entries over one another": over_one_another,
    "TorchScript": lambda: archive(
        GOOD, [*FOUR, ("code/__torch__.py", b"import os"), ("constants.pkl", b"\x80\x02).")]
    ),
    "another byte order": lambda: archive(GOOD, FOUR, order=b"big"),
    "no pickle inside": lambda: archive(GOOD, FOUR).replace(b"data.pkl", b"data.pkx"),
    "a zip of something else": lambda: archive(GOOD, FOUR, folder="word"),
    "cut short": lambda: archive(GOOD, FOUR)[:-60],
    "half a file": lambda: archive(GOOD, FOUR)[: len(archive(GOOD, FOUR)) // 2],
    "a size that lies": lambda: archive(GOOD, FOUR).replace(
        struct.pack("<II", 16, 16), struct.pack("<II", 2**30, 2**30)
    ),
    "encrypted": lambda: archive(GOOD, FOUR).replace(
        b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"
    ),
    "a legacy file": lambda: legacy(),
    "a legacy file that calls": lambda: pickle.dumps(Reduce(), 2),
    "a tar": lambda: tar(pickle.dumps(Reduce(), 2)),
    "empty": lambda: b"",
    "safetensors cut short": lambda: save_safetensors({"a": np.zeros(4)})[:-1],
    "safetensors too long": lambda: save_safetensors({"a": np.zeros(4)}) + b"x",
    "safetensors with a huge header": lambda: struct.pack("<Q", 2**40) + b"{}",
    "safetensors without JSON": lambda: struct.pack("<Q", 8) + b"{{{{{{{{",
    "safetensors over one another": lambda: header({"a": [0, 16], "b": [0, 16]}, 16),
    "safetensors with holes": lambda: header({"a": [16, 32]}, 32),
    "safetensors past the end": lambda: header({"a": [0, 16]}, 8),
    "safetensors backwards": lambda: header({"a": [16, 0]}, 16),
    "safetensors with a name twice": lambda: twice(),
    "safetensors a million deep": lambda: deep(),
}


def header(offsets, size):
    entries = {name: {"dtype": "F32", "shape": [4], "data_offsets": place} for name, place in offsets.items()}
    body = json.dumps(entries).encode()
    return struct.pack("<Q", len(body)) + body + bytes(size)


def twice():
    entry = '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    body = f"{{{entry},{entry}}}".encode()
    return struct.pack("<Q", len(body)) + body + bytes(16)


def deep():
    body = b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"
    return struct.pack("<Q", len(body)) + body


def legacy():
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """In a folder of its own, with a watch on what runs, how long it takes, and how much it allocates."""
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    start = time.process_time()
    yield tmp_path
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - start < 60
    assert peak < 400_000_000
    assert not list(tmp_path.rglob(CANARY)), "it ran"


def refused(path):
    with pytest.raises(convert.ConversionError) as error:
        bundle.read(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1600 and path.name in message
    return message


def test_the_corpus_is_large():
    assert len(PICKLES) + len(FILES) >= 100


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_refused(name, quiet):
    """In PyTorch's zip file, and bare (as PyTorch wrote before 1.6)."""
    path = quiet / "model.pt"
    path.write_bytes(archive(PICKLES[name], FOUR))
    message = refused(path)
    if name.startswith("calls "):
        assert name.removeprefix("calls ").replace(" ", ".") in message
    path.write_bytes(PICKLES[name])
    refused(path)


@pytest.mark.parametrize("name", ["calls os system", "nested, protocol 2", "storage of 2**60 numbers"])
def test_a_hostile_pickle_in_a_folder_is_refused(name, quiet):
    folder = quiet / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_text_model", "num_attention_heads": 8}))
    (folder / "pytorch_model.bin").write_bytes(archive(PICKLES[name], FOUR))
    with pytest.raises(convert.ConversionError, match=r"pytorch_model\.bin is refused"):
        bundle.read(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_refused(name, quiet):
    path = quiet / "model.ckpt"
    path.write_bytes(FILES[name]())
    message = refused(path)
    if name == "a legacy file":
        assert "before 1.6" in message and "torch.save(torch.load(" in message


@pytest.mark.parametrize(
    "record",
    [
        {"class": "os.system"},
        {"class": "DiT", "depth": 10**9},
        {"class": "DiT", "image_size": 10**7, "patch_size": 1},
        {"class": "DiT", "depth": "x"},
        {"class": "DiT", "heads": 0},
        {"class": "UNet", "block_out_channels": [32] * 10_000},
        {"class": "UNet", "layers_per_block": 10**8},
        {"class": "CLIPText", "layers": 10**9},
        {"class": "AutoencoderKL", "block_out_channels": []},
        {"class": "AutoencoderKL", "norm_num_groups": 0},
        {"class": "DiT", "dtype": "x"},
    ],
    ids=lambda record: ",".join(f"{k}={str(v)[:20]}" for k, v in record.items()),
)
def test_a_record_that_asks_for_anything_is_refused(record, quiet):
    """The description of the models that jdiff writes into its files is no more trusted than they are."""
    path = quiet / "x.safetensors"
    metadata = {"format": "pt", "jdiff": json.dumps({"models": {"model": record}})}
    path.write_bytes(save_safetensors({"a": np.zeros(4, np.float32)}, metadata))
    refused(path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "clip_text_model", "num_hidden_layers": 10**9},
        {"_class_name": "DiTTransformer2DModel", "sample_size": 10**8},
        {"_class_name": "DiTTransformer2DModel", "num_layers": 10**9},
        {"_class_name": "UNet2DConditionModel", "attention_head_dim": 8, "layers_per_block": 10**8},
        {"_class_name": "AutoencoderKL", "layers_per_block": "many"},
    ],
    ids=str,
)
def test_a_config_that_asks_for_anything_is_refused(config, quiet):
    folder = quiet / "part"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(save_safetensors({"a": np.zeros(4, np.float32)}))
    refused(folder)


def test_an_index_of_shards_stays_in_its_folder(quiet):
    folder = quiet / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (quiet / "other.safetensors").write_bytes(save_safetensors({"a": np.zeros(4)}))
    index = {"weight_map": {"a": "../other.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(convert.ConversionError, match="not a file beside it"):
        bundle.read(folder)


def good_pt():
    buffer = io.BytesIO()
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.float16), "c": torch.tensor(2)}
    torch.save({"model": state, "ema": dict(state), "args": {"lr": 1e-4, "names": ["x", "y"], "size": (3, 4)}}, buffer)
    return buffer.getvalue()


def test_a_good_file_is_read():
    """The fuzzing below starts from something that works."""
    with zipfile.ZipFile(io.BytesIO(good_pt())) as made:
        assert any(name.endswith("data.pkl") for name in made.namelist())


def fuzzed(data, rng, first=0, last=None):
    """A few bytes changed, dropped, doubled or put elsewhere."""
    out = bytearray(data)
    last = len(out) if last is None else last
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(first, max(first + 1, min(last, len(out))))
        how = rng.randrange(5)
        if how == 0:
            out[at] = rng.randrange(256)
        elif how == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            del out[at : at + rng.randint(1, 8)]
        elif how == 3:
            out[at:at] = out[at : at + rng.randint(1, 8)]
        else:
            out[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x00\x00\x00\x80"])
    return bytes(out)


@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
def test_fuzzing_never_crashes(kind, quiet, rounds=1500):
    """Any change is read as something or refused by a ConversionError; no other error, no code, no large allocation."""
    rng, path = random.Random(0), quiet / ("x.safetensors" if kind == "safetensors" else "x.pt")
    good = good_pt()
    with zipfile.ZipFile(io.BytesIO(good)) as made:
        inner = {name.partition("/")[2]: made.read(name) for name in made.namelist()}
    arrays = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float16)}
    plain = save_safetensors(arrays, {"format": "pt", "jdiff": "{}"})
    read, outcomes = (lambda: torchfile.read(path)) if kind != "safetensors" else (lambda: tensors.read(path)), [0, 0]
    for _ in range(rounds):
        if kind == "zip":
            data = fuzzed(good, rng)
        elif kind == "pickle":
            rest = [
                (name, content) for name, content in inner.items() if name not in ("data.pkl", "byteorder", "version")
            ]
            data = archive(fuzzed(inner["data.pkl"], rng), rest)
        else:
            data = fuzzed(plain, rng, 0, 8 + int.from_bytes(plain[:8], "little"))
        path.unlink(missing_ok=True)  # not written over: the one before may still be mapped
        path.write_bytes(data)
        try:
            content = read()
            outcomes[0] += 1
            for value in (content[0] if kind == "safetensors" else {}).values():
                np.asarray(value).sum()
        except convert.ConversionError as error:
            assert "\n" not in str(error)
            outcomes[1] += 1
    assert outcomes[1] > rounds // 10, outcomes


def test_a_read_only_view_cannot_change_the_file(quiet):
    path = quiet / "x.safetensors"
    path.write_bytes(save_safetensors({"a": np.zeros(4, np.float32)}))
    with pytest.raises(ValueError, match="read-only"):
        files.read_arrays([path])["a"][0] = 1
