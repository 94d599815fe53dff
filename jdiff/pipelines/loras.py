"""Adapters of a pipeline: how strong each is, changed without compiling anew."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jdiff import lora, tree
from jdiff.pipelines.rows import place


class WithLoras:
    """A pipeline whose `params` have had `loras` attached, in that order: [(name, strength), …].

    quantized: `loading.Opened.quantized`, which says what adapters fit.
    """

    params: Any
    mesh: Mesh
    loras: list[tuple[str, float]]
    quantized: Any = None

    def set_lora_scale(self, scale: float, name: str | None = None) -> None:
        """How much of an adapter there is: 1 is all that was trained, 0 nothing. name: which of `loras`; all when None.

        ValueError for a name that there is not, or where there is no adapter.
        """
        names = [known for known, _ in self.loras]
        if not names or (name is not None and name not in names):
            hint = tree.nearest(str(name), names) if names else ""
            raise ValueError(f"there is no LoRA {name or 'attached'}{hint}; there are {names}")
        for index, known in enumerate(names):
            if name in (None, known):
                self.params = place(self.mesh, lora.set_strength(self.params, index, float(scale)))
                self.loras[index] = (known, float(scale))
        self.__dict__.pop("model_hash", None)


def split_scale(text: str) -> tuple[str, float]:
    """A command line's `LORA[:SCALE]` as (LORA, SCALE), 1 where none is said."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError:  # a colon of the path's own
        return text, 1.0
