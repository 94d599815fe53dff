"""A TensorFlow Datasets set of pictures with classes or captions.

Read without TensorFlow, from array_record files whose pictures are kept encoded.
"""

import hashlib
import importlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jdiff.data.captions import KEYS
from jdiff.data.images import decode
from jdiff.data.packed import draw_one
from jdiff.data.source import BrokenRecord, DataError


class Tfds:
    """`path` is what `tfds.data_source` takes: a name as `imagenette`, `cifar10:3.0.2`, or a built data set's folder.

    The train split is read: `image`, the class `label`, and the caption `text`, `caption` or `prompt` (a text or several) where
    there is one; with a caption, the label may be missing. See `jdiff.data.Source`.
    """

    name = "tfds"
    kind: Literal["image", "latent"] = "image"
    buckets = None

    def __init__(self, path: str, image_size: int):
        self.path = path
        self.shape: tuple[int, int, int] = (image_size, image_size, 3)
        info = self._open()
        self._caption = _caption_key(info.features)
        self.has_captions = self._caption is not None
        self.class_names: list[str] = [info.name]
        self._labelled = hasattr(dict(info.features).get("label"), "num_classes")
        if self._labelled:
            label = info.features["label"]
            self.class_names = list(getattr(label, "names", None) or map(str, range(label.num_classes)))
        self._length = info.splits["train"].num_examples
        facts = f"{info.full_name}{self._length}{image_size}"
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]

    def _open(self) -> Any:
        """Opens the records; returns the set's DatasetInfo."""
        try:
            tfds = importlib.import_module("tensorflow_datasets")
        except ImportError as error:
            raise DataError("data.name='tfds' needs tensorflow-datasets: pip install 'jax-jdiff[tfds]'") from error
        if self.path.startswith(("/", ".", "~")) and not Path(self.path).is_dir():
            raise DataError(f"data.path={self.path!r} is no folder")
        try:
            if Path(self.path).is_dir():
                builder = tfds.builder_from_directory(self.path)
            else:
                builder = tfds.builder(self.path, file_format="array_record")
                builder.download_and_prepare()
            info = builder.info
            usable = hasattr(dict(info.features).get("label"), "num_classes") or _caption_key(info.features)
            if "image" not in info.features or not usable:
                raise DataError(
                    f"it has the features {sorted(info.features)}; jdiff reads `image` and a class `label` or a `text`"
                )
            if "train" not in info.splits:
                raise DataError(f"it has the splits {sorted(info.splits)}; jdiff reads `train`")
            decoders = {"image": tfds.decode.SkipDecoding()}
            self._records = builder.as_data_source(split="train", decoders=decoders)
        except Exception as error:  # tfds raises many kinds; each means that the set cannot be read here
            reason = " ".join(str(error).split()).partition(" Available datasets:")[0][:300]
            kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            raise DataError(f"data.path={self.path!r} cannot be read through tfds: {kind}{reason}") from error
        return info

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    @property
    def num_classes(self) -> int:
        """The label feature's number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self._length

    def texts(self, index: int) -> list[str]:
        """All of a record's captions; BrokenRecord when they cannot be read, or there are none."""
        return self._texts(self._record(index), index)

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`; also the `caption` where the set has one."""
        record = self._record(index)
        text = {"caption": draw_one(self._texts(record, index), rng)} if self.has_captions else {}
        try:
            image = decode(bytes(record["image"]), self.shape[0])
        except Exception as error:
            raise self._broken(index, error) from error
        label = np.int32(record["label"] if self._labelled else 0)
        return {"image": image[:, ::-1] if flip else image, "label": label, **text}

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return self._records[index]
        except Exception as error:
            raise self._broken(index, error) from error

    def _texts(self, record: dict[str, Any], index: int) -> list[str]:
        try:
            texts = [
                bytes(text).decode().strip() for text in np.atleast_1d(np.asarray(record[str(self._caption)], object))
            ]
            if not texts or not all(texts):
                raise ValueError(f"its `{self._caption}` is empty")
        except ValueError as error:
            raise self._broken(index, error) from error
        return texts

    def _broken(self, index: int, error: Exception) -> BrokenRecord:
        return BrokenRecord(f"{self.path}[{index}]", f"{type(error).__name__}: {error}".replace("\n", " "))


def _caption_key(features: Any) -> str | None:
    """The first feature that may be a caption, and is of text or a sequence of it."""
    for key in KEYS:
        feature = dict(features).get(key)
        if "Text" in (type(feature).__name__, type(getattr(feature, "feature", None)).__name__):
            return key
    return None
