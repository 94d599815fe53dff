"""Two sets of pictures in turn: a subject's, and others of its class that keep the model's idea of it (DreamBooth,
arXiv:2208.12242)."""

import hashlib
from typing import Any, Literal

import numpy as np

from jdiff.data.captions import Captions


class WithPrior:
    """`subject`'s records and `prior`'s one after the other, each as often as the longer of both takes; see `jdiff.data.Source`.

    Records have a `weight` for their loss: 1 for the subject's, `weight` for the prior's.
    """

    name = "captions"
    kind: Literal["image", "latent"] = "image"
    has_captions = True
    buckets = None
    num_classes = 1

    def __init__(self, subject: Captions, prior: Captions, weight: float):
        self._both, self._weights = (subject, prior), (np.float32(1.0), np.float32(weight))
        self.shape, self.class_names = subject.shape, subject.class_names
        facts = f"{subject.fingerprint}{prior.fingerprint}{weight}"
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return 2 * max(map(len, self._both))

    def texts(self, index: int) -> list[str]:
        """See `Captions.texts`."""
        source = self._both[index % 2]
        return source.texts(index // 2 % len(source))

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`; also the `caption` and the `weight`."""
        source = self._both[index % 2]
        return {**source.read(index // 2 % len(source), flip, rng), "weight": self._weights[index % 2]}
