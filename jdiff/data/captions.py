"""Pictures with captions, in the layout that is found at the path:

- `*.parquet` of a Hugging Face data set (see jdiff/data/parquet.py), one file or a folder of them;
- `metadata.jsonl` or `metadata.csv` beside the pictures, as Hugging Face's imagefolder has it: `file_name`, relative to it, and
  `text` (or `caption`, or `prompt`), in the JSON also a list of texts, of which one is drawn at each reading;
- a `.txt` of the same name beside each picture;
- pictures alone, where one prompt is given for all.

Every picture has a caption: those without are an error that names them.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from tqdm import tqdm

from jdiff.data import buckets, images
from jdiff.data.files import PICTURES, walk
from jdiff.data.packed import Packed, Texts, draw_one
from jdiff.data.source import BrokenRecord, DataError

KEYS = ("text", "caption", "prompt")
"""Where a caption may stand; the first of them that a data set has is read."""


class Layout(Protocol):
    """Pictures and their texts by number. Pickled to workers. digest: what a fingerprint takes in."""

    digest: bytes

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """What to call a record in an error or a log."""
        ...

    def picture(self, index: int) -> str | bytes:
        """A picture file's path, or its bytes. Any exception where it cannot be read."""
        ...

    def texts(self, index: int) -> list[str]:
        """A record's captions, one at least. Any exception where they cannot be read."""
        ...


class Captions:
    """Pictures of (image_size, image_size, 3), or of their bucket's size, with `caption`; see `jdiff.data.Source`.

    They are all of one class. sizes: the buckets' (`buckets.make_sizes`). random_crop: cut where `rng` says rather than in the
    middle. prompt: the caption of every picture below a folder that has none (DreamBooth's instance prompt).
    """

    name = "captions"
    kind: Literal["image", "latent"] = "image"
    has_captions = True

    def __init__(
        self,
        path: str,
        image_size: int,
        sizes: tuple[buckets.Size, ...] | None = None,
        random_crop: bool = False,
        prompt: str | None = None,
    ):
        self.shape: tuple[int, int, int] = (image_size, image_size, 3)
        self.class_names: list[str] = [Path(path).resolve().name]
        self._layout, self._random_crop = _open(Path(path), prompt), random_crop
        facts = hashlib.sha256(self._layout.digest + f"{self.shape}{random_crop}".encode())
        self.buckets = None
        if sizes is not None:
            layout = self._layout
            self.buckets = buckets.assign(sizes, len(layout), lambda i: images.header_size(layout.picture(i)), path)
            facts.update(self.buckets.digest())
        self.fingerprint = facts.hexdigest()[:16]

    @property
    def num_classes(self) -> int:
        """One."""
        return 1

    def __len__(self) -> int:
        return len(self._layout)

    def texts(self, index: int) -> list[str]:
        """All of a record's captions; BrokenRecord when they cannot be read."""
        try:
            return self._layout.texts(index)
        except Exception as error:
            raise self._broken(index, error) from error

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`; also the `caption`."""
        caption = draw_one(self.texts(index), rng)
        size = self.shape[0] if self.buckets is None else self.buckets.size(index)
        try:
            image = images.decode(self._layout.picture(index), size, rng if self._random_crop else None)
        except Exception as error:  # PIL's plugins raise nearly anything on damaged bytes
            raise self._broken(index, error) from error
        return {"image": image[:, ::-1] if flip else image, "label": np.int32(0), "caption": caption}

    def _broken(self, index: int, error: Exception) -> BrokenRecord:
        return BrokenRecord(self._layout.where(index), f"{type(error).__name__}: {error}".replace("\n", " "))


def _open(path: Path, prompt: str | None) -> Layout:
    """The layout that is found at `path`; DataError when there is none, or more than one, or captions beside a prompt."""
    if not path.exists():
        raise DataError(f"data.path={str(path)!r} does not exist")
    tables = [path] if path.is_file() else sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    listings = [file for name in ("metadata.jsonl", "metadata.csv") if (file := path / name).is_file()]
    if len(listings) + bool(tables) > 1:
        names = [file.name for file in listings + tables][:3]
        raise DataError(f"data.path={str(path)!r} holds captions in more than one form: {', '.join(names)}; leave one")
    if prompt is not None and (tables or listings):
        raise DataError(f"captions.prompt={prompt!r}: {str(path)!r} has captions of its own; leave the prompt out")
    try:
        if prompt is not None:
            return OnePrompt(path, prompt)
        if tables:
            from jdiff.data.parquet import Parquet

            return Parquet(tables)
        return Metadata(listings[0]) if listings else Sidecars(path)
    except OSError as error:
        raise DataError(f"data.path={str(path)!r} cannot be read: {error}") from error


class _Files:
    """What the layouts share whose pictures are files: their names, relative to a root."""

    _root: Path
    _names: Packed

    def __len__(self) -> int:
        return len(self._names)

    def where(self, index: int) -> str:
        """See `Layout`."""
        return str(self._root / os.fsdecode(self._names[index]))

    def picture(self, index: int) -> str:
        """See `Layout`."""
        return self.where(index)


class Metadata(_Files):
    """A `Layout`: the rows of metadata.jsonl or metadata.csv. A picture may stand in several rows; each is a record."""

    def __init__(self, file: Path):
        self._root = file.parent
        names, texts, key, missing = [], [], None, []
        with tqdm(desc=f"reading {file}", unit="row", leave=False, delay=1) as bar:
            for line, row in _rows(file):
                name = row.get("file_name")
                if not isinstance(name, str) or not name:
                    raise DataError(f"{file}:{line} has no `file_name`; it has {sorted(map(str, row))}")
                key = key or next((k for k in KEYS if k in row), None)
                own = as_texts(row.get(key), f"{file}:{line}") if key else []
                missing += [] if own else [name]
                names.append(name)
                texts.append(own)
                bar.update()
        if not names:
            raise DataError(f"{file} holds no rows; each names a picture (`file_name`) and its caption (`text`)")
        refuse_missing(missing, len(names), f"give each row of {file} one as `text`, `caption` or `prompt`")
        with tqdm(desc=f"listing {self._root}", unit="file", leave=False, delay=1) as bar:
            there = set(walk(self._root, PICTURES, bar))
        wanted = {os.path.normpath(name) for name in names}
        gone = [n for n in sorted(wanted - there) if not (self._root / n).is_file()]
        if gone:
            raise DataError(
                f"{file} names {_few(gone)}, which {'are' if len(gone) > 1 else 'is'} not there: mend the rows"
            )
        refuse_missing(sorted(there - wanted), len(there), f"name them in {file} or move them elsewhere")
        self._names, self._texts = Packed(os.fsencode(name) for name in names), Texts(texts)
        self.digest = self._names.buffer + self._names.offsets.tobytes() + self._texts.digest()

    def texts(self, index: int) -> list[str]:
        """See `Layout`."""
        return self._texts.of(index)


class Sidecars(_Files):
    """A `Layout`: pictures anywhere below a folder, each with NAME.txt beside it, which is read when the picture is."""

    def __init__(self, root: Path):
        self._root = root
        with tqdm(desc=f"listing {root}", unit="file", leave=False, delay=1) as bar:
            found = walk(root, (*PICTURES, ".txt"), bar)
        texts = {name.removesuffix(".txt") for name in found if name.endswith(".txt")}
        names = sorted(name for name in found if name.lower().endswith(PICTURES))
        if not names:
            raise DataError(f"data.path={str(root)!r} holds no pictures ({', '.join(PICTURES)}) and no parquet files")
        missing = [name for name in names if os.path.splitext(name)[0] not in texts]
        refuse_missing(
            missing, len(names), "write NAME.txt beside each, or a metadata.jsonl with `file_name` and `text`"
        )
        self._names = Packed(os.fsencode(name) for name in names)
        self.digest = self._names.buffer + self._names.offsets.tobytes()

    def texts(self, index: int) -> list[str]:
        """The whole file, without the white space round it; ValueError when that is nothing."""
        file = Path(os.path.splitext(self.where(index))[0] + ".txt")
        text = file.read_text(encoding="utf-8-sig").strip()
        if not text:
            raise ValueError(f"the caption in {file.name} is empty")
        return [text]


class OnePrompt(_Files):
    """A `Layout`: pictures anywhere below a folder, all with one caption."""

    def __init__(self, root: Path, prompt: str):
        self._root, self._texts = root, as_texts(prompt, "captions.prompt")
        if not self._texts:
            raise DataError("captions.prompt is blank: write what the pictures show, or leave it out")
        with tqdm(desc=f"listing {root}", unit="file", leave=False, delay=1) as bar:
            found = walk(root, (*PICTURES, ".txt"), bar)
        if texts := [name for name in found if name.endswith(".txt")]:
            raise DataError(f"captions.prompt={prompt!r}: {root / texts[0]} is a caption; leave the prompt out")
        if not found:
            raise DataError(f"data.path={str(root)!r} holds no pictures ({', '.join(PICTURES)})")
        self._names = Packed(os.fsencode(name) for name in sorted(found))
        self.digest = self._names.buffer + self._names.offsets.tobytes() + prompt.encode()

    def texts(self, index: int) -> list[str]:
        """See `Layout`."""
        return self._texts


def as_texts(value: Any, where: str) -> list[str]:
    """A caption, or a list of them, as a list: empty where there is none, or a blank one. DataError for another type."""
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: a caption is a string or a list of strings, found {str(value)[:80]!r}")
    try:
        return texts if all(text.strip() and text.encode() for text in texts) else []
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the caption is not valid Unicode: {error}") from error


def refuse_missing(missing: Sequence[str], count: int, advice: str) -> None:
    """DataError when pictures have no caption, that names the first."""
    if missing:
        raise DataError(f"{len(missing):,} of {count:,} pictures have no caption: {_few(missing)}; {advice}")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of metadata.jsonl or metadata.csv; DataError names a line that cannot be read."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        number = 0
        try:
            if file.suffix == ".csv":
                reader = csv.DictReader(lines, strict=True)
                for row in reader:
                    number = reader.line_num
                    yield number, row
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("it is no JSON object")
                    yield number, row
        except DataError:
            raise
        except (ValueError, csv.Error) as error:
            raise DataError(f"{file}:{number} cannot be read: {error}") from error
