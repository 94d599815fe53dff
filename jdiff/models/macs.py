"""Multiply-accumulates of a model's forward pass, counted in its traced program: matrix products and convolutions."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jdiff import target


def macs(model: Any, *inputs: Any) -> int:
    """Of one `model(*inputs)`; inputs are arrays or shapes. Nothing is computed."""
    variables = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), *inputs)
    return macs_of(model.apply, variables, *inputs)


def macs_of(function: Callable[..., Any], *inputs: Any) -> int:
    """Of one call of any function that JAX can trace; the same for all platforms, as a TPU takes some sums by products."""
    with target.compiling_for("cpu"):
        return _count(jax.make_jaxpr(function)(*inputs).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += _outputs(equation) * math.prod(shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, dims = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
            total += _outputs(equation) * int(np.prod(kernel)) // kernel[dims[0]]
        else:
            repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            total += repeats * sum(_count(inner) for inner in _inner(equation.params))
    return total


def _outputs(equation: Any) -> int:
    return math.prod(equation.outvars[0].aval.shape)


def _inner(params: dict[str, Any]) -> list[Any]:
    """The programs that an equation calls; of a choice's branches the first stands for all."""
    found = []
    for value in params.values():
        value = value[0] if isinstance(value, tuple | list) and value else value
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            found.append(jaxpr)
    return found
