"""Pictures to their class, under cross-entropy: a network by whose features pictures are scored, where Inception is not at hand."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jdiff import models, sharding
from jdiff.loading import DTYPES
from jdiff.pipelines import from_uint8, gather, grid
from jdiff.pipelines.rows import spread
from jdiff.tasks import NOTHING, Batch, Losses, mean_gradient, open_source
from jdiff.tasks.heldout import heldout_records


class Classifier:
    """See `jdiff.tasks.Task`."""

    transform = None
    frozen = base = NOTHING
    adaptable = ()

    def __init__(self, config: Any, mesh: Mesh, workdir: Path | None = None):
        self.config, self.mesh, self.title = config, mesh, "classifier"
        if config.init_from is not None:
            raise ValueError(f"init_from={config.init_from}: a classifier starts from nothing")
        self.source = open_source(config)
        if self.source.kind != "image":
            raise ValueError(
                f"data.name={config.data.name!r} holds {self.source.kind}s; a classifier trains on pictures"
            )
        size, _, channels = self.source.shape
        shape = {"image_size": size, "channels": channels, "num_classes": self.source.num_classes}
        self.model = models.create("classifier", **config.model, **shape, dtype=DTYPES[config.precision])
        self.gradient = mean_gradient(self.loss)

    def loss(self, full: Any, batch: Batch, keys_B: jax.Array) -> Losses:
        """Cross-entropy, its targets smoothed (arXiv:1512.00567), and the share that is told right."""
        logits_BK = self.model.apply({"params": full["classifier"]}, from_uint8(batch["image"]))[0]
        target_BK = jax.nn.one_hot(batch["label"], self.model.num_classes)
        smooth = self.config.loss.label_smoothing
        target_BK = (1 - smooth) * target_BK + smooth / self.model.num_classes
        right_B = (logits_BK.argmax(-1) == batch["label"]).astype(jnp.float32)
        return {"loss": -(target_BK * jax.nn.log_softmax(logits_BK)).sum(-1), "accuracy": right_B}

    def given(self) -> Any:
        """Nothing."""
        return {}

    def init(self, key: jax.Array, given: Any) -> Any:
        """The model's own initialisation."""
        return {"classifier": self.model.init(key, *self.model.dummy_inputs())["params"]}

    @cached_property
    def heldout(self) -> dict[str, np.ndarray]:
        """See `heldout_records`."""
        return heldout_records(self.config, self.source)

    @cached_property
    def _apply(self) -> Any:
        told = lambda params, image: self.model.apply({"params": params}, from_uint8(image))[0]  # noqa: E731
        return jax.jit(told, out_shardings=sharding.batch_sharding(self.mesh))

    def _told(self, full: Any) -> np.ndarray:
        """The classes that the held-out pictures are taken for."""
        images = self.heldout["image"]
        logits = self._apply(full["classifier"], spread(self.mesh, {"image": images})["image"])
        return gather(logits)[: len(images)].argmax(-1)

    def measure(self, full: Any) -> dict[str, float]:
        """The share of held-out pictures that is told right."""
        return {"heldout_accuracy": float((self._told(full) == self.heldout["label"]).mean())}

    def grid(self, full: Any) -> tuple[Image.Image, dict[str, Any]]:
        """Held-out pictures, a column for each class that they are taken for; white where there are no more of one."""
        told, rows, classes = self._told(full), self.config.sample.rows, self.model.num_classes
        pictures = np.full((rows, classes, *self.heldout["image"].shape[1:]), 255, np.uint8)
        for name in range(classes):
            found = self.heldout["image"][told == name][:rows]
            pictures[: len(found), name] = found
        return grid(pictures.reshape(-1, *pictures.shape[2:]), columns=classes), {"columns": self.source.class_names}

    def facts(self, measures: Mapping[str, float]) -> dict[str, Any]:
        """See `Task.facts`."""
        return {
            "main": "classifier",
            "models": {"classifier": models.describe(self.model)},
            "class_names": list(self.source.class_names),
            "data_fingerprint": self.source.fingerprint,
        }

    def macs(self) -> int:
        """The model's."""
        return self.model.macs()
