"""Kernels that XLA:TPU gives no estimate for, counted by what they multiply: JAX's splash attention."""

import math
from collections.abc import Sequence

from jdiff.plan.hlo import Array
from jdiff.sums import LANES

SHARE = 0.5
"""Of peak, on heads padded to `LANES`: taken, not measured."""
PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
"""Of a kernel's name: how many products of queries and keys it makes. The backward pass is one kernel, and makes scores anew."""


def kernel_flops(name: str, operands: Sequence[Array]) -> int | None:
    """What an instruction of this name multiplies, heads padded; None where it is no known kernel.

    operands: the first two floats of three axes or more are queries (..., heads, tokens, width), and keys (..., width, tokens).
    """
    products = next((count for kernel, count in PRODUCTS.items() if name.startswith(kernel)), None)
    if products is None:
        return None
    q, k = [x.shape for x in operands if len(x.shape) >= 3 and x.dtype in ("bf16", "f16", "f32")][:2]
    width = math.ceil(q[-1] / LANES) * LANES
    return 2 * products * math.prod(q[:-1]) * k[-1] * width
