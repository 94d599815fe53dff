"""A TensorFlow Datasets image classification set, read without TensorFlow (array_record files, pictures kept encoded)."""

import hashlib
import importlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jdiff.data.images import decode
from jdiff.data.source import BrokenRecord, DataError


class Tfds:
    """`path` is what `tfds.data_source` takes: a name as `imagenette`, `cifar10:3.0.2`, or a built data set's folder.

    The train split is read; see `jdiff.data.Source`.
    """

    name = "tfds"
    kind: Literal["image", "latent"] = "image"

    def __init__(self, path: str, image_size: int):
        self.path = path
        self.shape: tuple[int, int, int] = (image_size, image_size, 3)
        info = self._open()
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
            if not {"image", "label"} <= set(info.features) or not hasattr(info.features["label"], "num_classes"):
                raise DataError(f"it has the features {sorted(info.features)}; jdiff reads `image` and a class `label`")
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

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`."""
        try:
            record = self._records[index]
            image = decode(bytes(record["image"]), self.shape[0])
        except Exception as error:
            raise BrokenRecord(
                f"{self.path}[{index}]", f"{type(error).__name__}: {error}".replace("\n", " ")
            ) from error
        return {"image": image[:, ::-1] if flip else image, "label": np.int32(record["label"])}
