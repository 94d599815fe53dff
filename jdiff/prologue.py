"""What comes before a product and is not made yet: the product says in what numbers it takes it.

In front of a product of integers XLA:TPU fuses nothing but a bare conversion. What normalises or attends, and rounds in the same
pass, is a kernel; it has to know the step that it rounds to, which the product's QTensor holds.
"""

import abc
from typing import Any, TypeAlias

import jax


class Prologue(abc.ABC):
    """A pytree of the arrays that it is made of. shape, dtype: of the array that it stands for; as the first one's, if it says no
    other."""

    @property
    def shape(self) -> tuple[int, ...]:
        return jax.tree.leaves(self)[0].shape

    @property
    def dtype(self) -> Any:
        return jax.tree.leaves(self)[0].dtype

    @abc.abstractmethod
    def floats(self) -> jax.Array:
        """The array."""

    @abc.abstractmethod
    def rounds(self, fixed: bool) -> bool:
        """Whether the platform that is traced for has a kernel for `integers` by a fixed step, or by one a token."""

    @abc.abstractmethod
    def integers(self, step: jax.Array | None) -> list[jax.Array]:
        """[int8 near `floats() / step`, clipped to 127]; step: a number. For None by a step a token (..., 1), that of its largest
        value, which is made too. It has no gradient."""


Input: TypeAlias = jax.Array | Prologue
"""What a layer of products takes."""
