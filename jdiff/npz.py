"""NumPy's files: nothing in one is unpickled, and nothing is made that is larger than the file."""

import contextlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

BROKEN = (
    *(OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, SyntaxError, OverflowError, TypeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
"""What zipfile and NumPy make of damaged or hostile bytes."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever reading raises as a ValueError, in one line that names the file."""
    try:
        yield
    except BROKEN as error:
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} cannot be read: {line or type(error).__name__}") from error


def mapped(path: Path) -> np.ndarray:
    """The array of an .npy file, mapped from it; ValueError where it is none, of objects, or longer than the file."""
    with reading(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)


class Npz(Mapping[str, np.ndarray]):
    """The arrays of a file by name, each read when it is asked for. A context manager.

    ValueError, in one line that names the file, where it is no .npz, or an array is damaged, of objects, or not as long as it
    says; KeyError for one that is not there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with reading(self.path):
            self.archive = zipfile.ZipFile(self.path)
        self._names = {name.removesuffix(".npy"): name for name in self.archive.namelist() if name.endswith(".npy")}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # a Mapping's own would read the array

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> np.ndarray:
        member = self._names[name]
        with reading(self.path), self.archive.open(member) as file:
            self._header(name, file)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)

    def header(self, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        """(shape, whether in Fortran's order, dtype) of an array from its opened member, which is left where its bytes begin."""
        with reading(self.path):
            return self._header(name, file)

    def open(self, name: str) -> IO[bytes]:
        """An array's member, to be read piece by piece."""
        with reading(self.path):
            return self.archive.open(self._names[name])

    def info(self, name: str) -> zipfile.ZipInfo:
        """What the archive says of an array's member."""
        return self.archive.getinfo(self._names[name])

    def _header(self, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        count = 1
        for n in shape:  # in whole numbers of any size
            count *= int(n)
        if dtype.hasobject or min(shape, default=0) < 0:
            raise ValueError(f"{name} is {dtype}{list(shape)}, and only numbers and texts are read")
        if file.tell() + count * dtype.itemsize != self.info(name).file_size:
            raise ValueError(f"{name} is not as long as its shape {list(shape)} says")
        return shape, fortran, dtype

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_: object) -> None:
        self.archive.close()
