"""Parquet files as the Hugging Face hub keeps pictures: `image` (bytes, or a struct with `bytes`) and a column of captions.

A row group is the least that can be read, so reading in order is quick (tools/cache_latents.py does), and reading in random
order too as long as the groups last used, up to `MOST_BYTES` a process, hold most of the data set.
"""

import collections
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jdiff.data.captions import KEYS, as_texts, refuse_missing
from jdiff.data.packed import Texts
from jdiff.data.source import DataError

log = logging.getLogger(__name__)
MOST_BYTES = 2**29
"""Of row groups kept in memory by each process."""


class Parquet:
    """A `jdiff.data.captions.Layout`. Captions are held in memory, pictures are not.

    files: where some are named train-*, as the hub names splits, only those are read.
    """

    def __init__(self, files: list[Path]):
        _pyarrow()
        train = [file for file in files if file.name.startswith("train-")]
        if train and len(train) < len(files):
            log.info("reading the %d files named train-*, not the other %d", len(train), len(files) - len(train))
        self._files = [str(file) for file in train or files]
        texts, groups, missing, size = [], [], [], 0
        self._columns: list[str] = []
        for number, file in enumerate(tqdm(self._files, desc="reading captions", unit="file", leave=False, delay=1)):
            column, own = self._scan(number, file, groups)
            self._columns.append(column)
            missing += [f"{file} row {row}" for row, caption in enumerate(own) if not caption]
            texts += own
            size += Path(file).stat().st_size
        if not texts:
            raise DataError(f"{self._files[0]}{' and the others hold' if len(files) > 1 else ' holds'} no rows")
        refuse_missing(missing, len(texts), "write one in each row, or leave such rows out")
        if size > MOST_BYTES:
            gib = size / 2**30
            log.info(
                "%.1f GiB of parquet files: random order reads whole row groups; cache latents where it is slow", gib
            )
        self._texts = Texts(texts)
        self._groups = np.asarray(groups)  # of file and number in it
        self._starts = np.cumsum([0, *(rows for _, _, rows in groups)])
        names = "\n".join(Path(file).name for file in self._files)
        self.digest = names.encode() + self._groups.tobytes() + self._texts.digest()
        self._start()

    def _start(self) -> None:
        self._lock, self._kept, self._bytes = threading.Lock(), collections.OrderedDict[int, Any](), 0
        self._open: dict[int, Any] = {}

    def _scan(self, number: int, file: str, groups: list[tuple[int, int, int]]) -> tuple[str, list[list[str]]]:
        """The name of a file's column of pictures and its captions; appends (file, group, rows) to `groups`."""
        arrow, parquet = _pyarrow()
        try:
            with parquet.ParquetFile(file) as opened:
                schema, meta = opened.schema_arrow, opened.metadata
                key = next((key for key in KEYS if key in schema.names), None)
                kind = schema.field("image").type if "image" in schema.names else None
                struct = kind is not None and arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
                plain = kind is not None and (arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))
                if key is None or not (struct or plain):
                    found = ", ".join(f"{field.name}: {field.type}" for field in schema)
                    raise DataError(f"{file} has the columns {found[:300]}; jdiff reads `image`, of bytes, and `text`")
                groups += [(number, g, meta.row_group(g).num_rows) for g in range(meta.num_row_groups)]
                values = opened.read(columns=[key])[key].to_pylist()
        except (OSError, arrow.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{file} cannot be read as parquet: {reason}; get it anew or remove it") from error
        return "image.bytes" if struct else "image", [as_texts(v, f"{file} row {i}") for i, v in enumerate(values)]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_kept", "_bytes", "_open")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start()

    def __len__(self) -> int:
        return len(self._texts)

    def where(self, index: int) -> str:
        """See `Layout`."""
        group = self._group_of(index)
        file = self._groups[group, 0]
        first = self._starts[int(np.searchsorted(self._groups[:, 0], file))]
        return f"{self._files[file]} row {index - first}"

    def texts(self, index: int) -> list[str]:
        """See `Layout`."""
        return self._texts.of(index)

    def picture(self, index: int) -> bytes:
        """See `Layout`."""
        group = self._group_of(index)
        picture = self._read(group)[int(index - self._starts[group])].as_py()
        if picture is None:
            raise ValueError("the row holds no bytes of a picture")
        return picture

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _read(self, group: int) -> Any:
        """A row group's pictures; those last used are kept."""
        _, parquet = _pyarrow()
        with self._lock:
            pictures = self._kept.pop(group, None)
            if pictures is None:
                file, number, _ = map(int, self._groups[group])
                if file not in self._open:
                    self._open[file] = parquet.ParquetFile(self._files[file])
                table = self._open[file].read_row_group(number, columns=[self._columns[file]])
                pictures = table.flatten().column(0)
                self._bytes += pictures.nbytes
            self._kept[group] = pictures
            while self._bytes > MOST_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
            return pictures


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("parquet files need pyarrow: pip install 'jax-jdiff[parquet]'") from error
    return pyarrow, pyarrow.parquet
