"""PyTorch's zip files, read and written without torch: a pickle of the structure, and each storage as raw bytes.

The format is that of torch.save since 1.6 (`ARCHIVE/data.pkl`, `ARCHIVE/data/KEY`, `ARCHIVE/byteorder`, `ARCHIVE/version`),
nothing compressed. Tensors are views of the mapped file.
"""

import hashlib
import itertools
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jdiff.convert import pickles
from jdiff.convert.arrays import Array, contiguous, is_float, release
from jdiff.convert.rows import ConversionError, refuse

MAGIC = b"PK\x03\x04"
_RESAVE = "save it again with PyTorch: python -c \"import torch; torch.save(torch.load('{0}', weights_only=True), '{0}.new')\""
_MOST_ENTRIES = 200_000


def is_legacy(head: bytes) -> bool:
    """Whether a file's first 512 bytes are of a pickle or a tar, as PyTorch wrote before 1.6."""
    return head[:1] == b"\x80" or head[257:262] == b"ustar"


def refuse_legacy(file: Path) -> ConversionError:
    """The error for such a file."""
    return refuse(f"{file} is of PyTorch's format before 1.6, which jdiff does not read: {_RESAVE.format(file)}")


def read(file: Path) -> Any:
    """What a file of torch.save holds: dicts, lists, tuples, texts, and numpy arrays for tensors.

    Nothing in the file is run: see `pickles`. ConversionError when it is broken, holds something else, or claims a tensor
    that its bytes are too few for.
    """
    try:
        return _read(file)
    except ConversionError as error:
        raise ConversionError(f"{file} is refused: {error}") from error
    except (OSError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, ValueError, EOFError) as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error


def _read(file: Path) -> Any:
    with open(file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    records = _records(infos, mapped)
    data = records.get("data.pkl")
    if data is None:
        raise refuse("it holds no data.pkl, so it is no file of torch.save")
    if any(name.startswith("code/") or name == "constants.pkl" for name in records):
        raise refuse("it is a TorchScript archive, which holds code: save the module's state_dict instead")
    order = records.get("byteorder")
    if order is not None and bytes(mapped[order]) != b"little":
        raise refuse("its byte order is not little-endian")
    return pickles.load(bytes(mapped[data]), lambda key: _storage(key, records, mapped), _tensor)


def _records(infos: list[zipfile.ZipInfo], mapped: mmap.mmap) -> dict[str, slice]:
    """Where each entry's bytes lie, by its name within the archive's one folder.

    Entries must be stored as they are, inside the file, each once and no two over one another: what is claimed is there.
    """
    if len(infos) > _MOST_ENTRIES:
        raise refuse(f"it has {len(infos)} entries")
    records: dict[str, slice] = {}
    folders = set()
    for info in infos:
        folder, _, name = info.filename.partition("/")
        parts = info.filename.split("/")
        if not name or ".." in parts or "" in parts or "\\" in info.filename:
            raise refuse(f"its entry {info.filename[:200]!r} is not of a folder's file")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1 or info.compress_size != info.file_size:
            raise refuse(f"its entry {info.filename[:200]!r} is compressed or encrypted, which torch.save does to none")
        if name in records:
            raise refuse(f"its entry {info.filename[:200]!r} is there twice")
        head = mapped[info.header_offset : info.header_offset + 30]
        if len(head) != 30 or head[:4] != MAGIC:
            raise refuse(f"its entry {info.filename[:200]!r} has no header where the directory says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
        if start + info.file_size > len(mapped):
            raise refuse(f"its entry {info.filename[:200]!r} is cut short")
        records[name] = slice(start, start + info.file_size)
        folders.add(folder)
    if len(folders) > 1:
        raise refuse(f"it has the folders {sorted(folders)[:3]}, and torch.save makes one")
    placed = sorted(records.values(), key=lambda place: (place.start, place.stop))
    if any(after.start < before.stop for before, after in itertools.pairwise(placed)):
        raise refuse("its entries lie over one another")
    return records


def _storage(key: Any, records: Mapping[str, slice], mapped: mmap.mmap) -> np.ndarray:
    """A storage as a flat array; key: ("storage", type, name, device, length)."""
    if (
        not isinstance(key, tuple)
        or len(key) != 5
        or key[0] != "storage"
        or not isinstance(key[1], pickles.StorageType)
    ):
        raise refuse("the pickle has a persistent id that is no storage")
    _, kind, name, _, length = key
    place = records.get(f"data/{name}") if isinstance(name, str) else None
    if place is None:
        raise refuse(f"the storage {str(name)[:80]!r} is missing")
    there = place.stop - place.start
    if not _is_count(length) or length * kind.dtype.itemsize != there:
        raise refuse(
            f"the storage {name} should have {str(length)[:30]} numbers of {kind.dtype}, and is {there} bytes long"
        )
    return np.frombuffer(mapped, kind.dtype, length, place.start) if length else np.zeros(0, kind.dtype)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    """A view of a storage, which has to have all of it."""
    sizes_fit = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 32
    if not isinstance(storage, np.ndarray) or not sizes_fit or not all(map(_is_count, (offset, *size, *stride))):
        raise refuse("the pickle has a tensor whose size makes no sense")
    count = 1
    for length in size:
        count *= length
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
    if count > storage.size or last >= max(storage.size, 1) or (count and not storage.size):
        raise refuse(f"the pickle has a tensor of size {list(size)[:8]} in a storage of {storage.size} numbers")
    if not count:
        return np.zeros(size, storage.dtype) if all(length < 2**31 for length in size) else np.zeros(0, storage.dtype)
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


# Writing

_STORAGE_NAMES = {np.dtype(dtype): name for name, dtype in pickles.STORAGES.items()}


def write(file: Path, content: Any, dtype: Any = None, after: Callable[[int], None] = lambda _: None) -> None:
    """A file that torch.load(weights_only=True) opens, from dicts, lists, texts and arrays.

    dtype: what floating-point arrays are cast to, each when it is written. after: called with each array's bytes once they are
    written. Arrays are written one at a time in C order, so that memory grows by one of them.
    """
    pickler = _Pickler(dtype)
    body = pickler.dump(content)
    with open(file, "wb") as opened, zipfile.ZipFile(opened, "w", zipfile.ZIP_STORED) as archive:
        _entry(archive, "archive/data.pkl", body)
        _entry(archive, "archive/byteorder", b"little")
        for i, array in enumerate(pickler.arrays):
            values = contiguous(array, pickler.dtype_of(array))
            _entry(archive, f"archive/data/{i}", values.reshape(-1).view(np.uint8).data)
            release(array)
            after(values.nbytes)
        _entry(archive, "archive/version", b"3\n")


def check(file: Path, content: Any, dtype: Any = None) -> str:
    """Reads a file back against what was written, and returns its sha256. ConversionError for the first array that differs."""
    with ThreadPoolExecutor(1) as other:
        digest = other.submit(_sha256, file)
        wanted, found = dict(_tensors(content)), dict(_tensors(read(file)))
        if list(wanted) != list(found):
            raise refuse(f"{file} was written, but holds other arrays: the disk may be full or broken")
        pickler = _Pickler(dtype)
        for name, array in wanted.items():
            values, there = contiguous(array, pickler.dtype_of(array)), found[name]
            same = there.shape == values.shape and there.dtype == values.dtype
            if not same or not np.array_equal(values.reshape(-1).view(np.uint8), there.reshape(-1).view(np.uint8)):
                raise refuse(f"{name} was written, but other numbers were read back: the disk may be full or broken")
            release(there)
            release(array)
        return digest.result()


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _tensors(content: Any, path: str = "") -> Iterator[tuple[str, Array]]:
    """Every array of a nest of dicts, by its place."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, f"{path}/{key}")
    elif hasattr(content, "dtype") and hasattr(content, "shape"):
        yield path, content


def _entry(archive: zipfile.ZipFile, name: str, data: Any) -> None:
    """One stored entry whose bytes begin at a multiple of 64, as torch.save has them."""
    info = zipfile.ZipInfo(name)
    large = len(data) >= 2**31
    start = archive.fp.tell() + 30 + len(name) + 4 + 20 * large  # type: ignore[union-attr]
    filling = -start % 64
    info.extra = struct.pack("<HH", 0x4246, filling) + b"Z" * filling
    with archive.open(info, "w", force_zip64=large) as entry:
        entry.write(data)


class _Pickler:
    """Protocol 2, for state dicts and what stands around them; arrays are put aside in `arrays`."""

    def __init__(self, dtype: Any):
        self.dtype = None if dtype is None else np.dtype(dtype)
        self.arrays: list[Array] = []

    def dtype_of(self, array: Array) -> np.dtype:
        """What an array is written as."""
        return self.dtype if self.dtype is not None and is_float(array.dtype) else np.dtype(array.dtype)

    def dump(self, content: Any) -> bytes:
        """The pickle, checked by its own disassembler."""
        body = b"\x80\x02" + self.value(content) + b"."
        for _ in pickletools.genops(body):
            pass
        return body

    def value(self, x: Any) -> bytes:
        """One object's opcodes."""
        if x is None or isinstance(x, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[x]
        if isinstance(x, int):
            return b"J" + struct.pack("<i", x) if -(2**31) <= x < 2**31 else _long(x)
        if isinstance(x, float):
            return b"G" + struct.pack(">d", x)
        if isinstance(x, str):
            return _text(x)
        if isinstance(x, tuple):
            return b"(" + b"".join(map(self.value, x)) + b"t"
        if isinstance(x, list):
            return b"](" + b"".join(map(self.value, x)) + b"e"
        if isinstance(x, pickles.StateDict):
            state = b"" if not x.attributes else self.value(dict(x.attributes)) + b"b"
            return b"ccollections\nOrderedDict\n)R" + self.items(x) + state
        if isinstance(x, dict):
            return b"}" + self.items(x)
        if hasattr(x, "dtype") and hasattr(x, "shape"):
            return self.tensor(x)
        raise TypeError(f"a {type(x).__name__} cannot be stored in a PyTorch file")

    def items(self, x: dict) -> bytes:
        """A dict's items, added to the one on top."""
        return b"(" + b"".join(self.value(key) + self.value(value) for key, value in x.items()) + b"u" if x else b""

    def tensor(self, x: Array) -> bytes:
        """An array, contiguous in a storage of its own."""
        dtype = self.dtype_of(x)
        if dtype not in _STORAGE_NAMES:
            raise TypeError(f"an array of {dtype} cannot be stored in a PyTorch file")
        shape = tuple(int(n) for n in x.shape)
        count = int(np.prod(shape, dtype=np.int64))
        strides = tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))
        kind = b"ctorch\n" + _STORAGE_NAMES[dtype].encode() + b"\n"
        storage = (
            b"(" + _text("storage") + kind + _text(str(len(self.arrays))) + _text("cpu") + self.value(count) + b"tQ"
        )
        self.arrays.append(x)
        hooks = b"ccollections\nOrderedDict\n)R"
        arguments = storage + self.value(0) + self.value(shape) + self.value(strides) + b"\x89" + hooks
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def _text(x: str) -> bytes:
    data = x.encode("utf-8")
    return b"X" + struct.pack("<I", len(data)) + data


def _long(x: int) -> bytes:
    data = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(data)) + data
