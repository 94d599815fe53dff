"""Where both benchmarks put what they run on."""

from typing import Any

import jax
import numpy as np

from jdiff import sharding
from jdiff.pipelines.rows import place, spread


def over_devices(params: Any, *rows: np.ndarray) -> tuple[Any, list[jax.Array]]:
    """Parameters on every device, and arrays with their rows over them, as training and sampling have them."""
    mesh = sharding.make_mesh()
    return place(mesh, params), list(spread(mesh, {str(i): array for i, array in enumerate(rows)}).values())
