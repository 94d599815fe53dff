"""safetensors files: checked by the library, read as views of the mapped file, written array by array and read back."""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jdiff.convert.arrays import Array, contiguous, is_float, release
from jdiff.convert.rows import ConversionError, refuse

DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
_MOST_HEADER = 100_000_000
_CHUNK = 1 << 24


def looks_like(file: Path) -> bool:
    """Whether a file begins as safetensors do: the header's length, then JSON."""
    with open(file, "rb") as opened:
        head = opened.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MOST_HEADER


def read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, metadata). Arrays are read-only views of the file, which stays mapped as long as one lives.

    ConversionError for a file that the library does not accept: cut short, a lying or overlapping header, unknown dtypes; or
    that names an array twice.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as checked:
            names = set(checked.keys())
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length), object_pairs_hook=_once)
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error
    metadata = header.pop("__metadata__", None) or {}
    if names != set(header):
        raise refuse(f"{file} cannot be read: its header is not what the library reads in it")
    return {name: _view(file, name, entry, mapped, 8 + length) for name, entry in header.items()}, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _view(file: Path, name: str, entry: Mapping[str, Any], mapped: mmap.mmap, start: int) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise refuse(f"{file}: {name} is of {entry['dtype']}, which jdiff does not read")
    dtype, (first, last) = np.dtype(DTYPES[entry["dtype"]]), entry["data_offsets"]
    count = int(np.prod(entry["shape"], dtype=np.int64))
    if last - first != count * dtype.itemsize or start + last > len(mapped):
        raise refuse(f"{file}: {name} is not as long as its shape {entry['shape']} says")
    flat = np.frombuffer(mapped, dtype, count, start + first) if count else np.zeros(0, dtype)
    return flat.reshape(entry["shape"])


def write(
    file: Path,
    arrays: Mapping[str, Array],
    metadata: Mapping[str, str],
    dtype: Any = None,
    after: Callable[[int], None] = lambda _: None,
) -> str:
    """Writes a file, reads it back against the arrays, and returns its sha256.

    The library's own writer needs all arrays at once and takes strided ones for what they are not (safetensors#825); this one
    forms one at a time, in C order. dtype: what floating-point arrays are cast to. after: called with each array's bytes.
    ConversionError when what is read back is not what was written.
    """
    from safetensors import safe_open

    kinds = {name: _written(array, dtype) for name, array in arrays.items()}
    # as the library has them: wide numbers first, so that all are aligned
    order = sorted(arrays, key=lambda name: (-kinds[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        if kinds[name] not in CODES:
            raise refuse(f"{name} is of {kinds[name]}, which safetensors does not hold")
        length = int(np.prod(arrays[name].shape, dtype=np.int64)) * kinds[name].itemsize
        shape = [int(n) for n in arrays[name].shape]
        header[name] = {"dtype": CODES[kinds[name]], "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    # hashing takes as long as writing, and lets go of Python's lock
    with open(file, "wb") as opened, ThreadPoolExecutor(1) as other:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = _bytes(arrays[name], kinds[name]).data
            hashed = other.submit(digest.update, data)
            opened.write(data)
            hashed.result()
            release(arrays[name])
            after(len(data))
        opened.flush()
        os.fsync(opened.fileno())
    with open(file, "rb") as opened:
        opened.seek(8 + len(text))
        for name in order:
            _compare(opened, _bytes(arrays[name], kinds[name]), name)
            release(arrays[name])
    with safe_open(file, framework="numpy") as checked:
        if set(checked.keys()) != set(arrays):
            raise refuse(f"{file} was written, but the library reads other names in it")
    return digest.hexdigest()


def _written(array: Array, dtype: Any) -> np.dtype:
    return np.dtype(dtype) if dtype is not None and is_float(array.dtype) else np.dtype(array.dtype)


def _bytes(array: Array, dtype: np.dtype) -> np.ndarray:
    """The array's bytes in C order, uint8."""
    return contiguous(array, dtype).reshape(-1).view(np.uint8)


def _compare(opened: Any, expected: np.ndarray, name: str) -> None:
    for start in range(0, len(expected), _CHUNK):
        wanted = expected[start : start + _CHUNK]
        if not np.array_equal(np.frombuffer(opened.read(len(wanted)), np.uint8), wanted):
            raise refuse(f"{name} was written, but other bytes were read back: the disk may be full or broken")
