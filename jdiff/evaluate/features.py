"""Pictures to the features that scores compare: one interface over the networks that make them."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdiff import checkpoint, convert, sharding, tree
from jdiff.loading import load_run, on
from jdiff.models import inception
from jdiff.models.inception import Inception
from jdiff.pipelines import from_uint8, gather
from jdiff.pipelines.rows import spread

RESIZES = ("tf", "torch")
"""How Inception's pictures come to 299x299: bilinear with corners at 0 and pixels taken as (x - 128) / 128, as TensorFlow's graph
does it for the FID of the papers (TTUR's and ADM's code); or with pixels' centres at halves and x / 127.5 - 1, as pytorch-fid."""
ROWS = 32
"""Pictures that a device has in work at once."""


@dataclasses.dataclass(frozen=True)
class Features:
    """Of N pictures. logits_NK: of the network's classes; spatial_ND: where there is a map, for sFID. network: its title."""

    pool_ND: np.ndarray
    logits_NK: np.ndarray
    spatial_ND: np.ndarray | None = None
    network: str = dataclasses.field(default="", kw_only=True)

    def __len__(self) -> int:
        return len(self.pool_ND)


@dataclasses.dataclass(frozen=True)
class Network:
    """What makes features of pictures. title: what it is, with a hash of its weights, and how pictures are resized for it; only
    scores of one title compare. apply: (params, uint8 (B, H, W, 3)) -> (pool, logits[, spatial]), traced."""

    title: str
    params: Any
    apply: Callable[[Any, jax.Array], tuple[jax.Array, ...]]

    def features(self, batches: Iterable[np.ndarray], mesh: Mesh | None = None) -> Features:
        """Of all pictures, uint8 (B, H, W, 3) each; a batch goes over the devices, ROWS to each at a time."""
        mesh = mesh or sharding.make_mesh()
        params, apply = on(mesh, self.params), jax.jit(self.apply, out_shardings=sharding.replicated(mesh))
        found = [
            [gather(part)[: len(rows)] for part in apply(params, spread(mesh, {"image": padded(rows, size)})["image"])]
            for batch in batches
            for size in (ROWS * mesh.size,)
            for rows in (batch[i : i + size] for i in range(0, len(batch), size))
        ]
        if not found:
            raise ValueError("there are no pictures to score")
        return Features(*(np.concatenate(parts) for parts in zip(*found, strict=True)), network=self.title)


def padded(rows_BHWC: np.ndarray, size: int) -> np.ndarray:
    """Rows repeated to `size` of them, so that the last batch does not compile anew."""
    return rows_BHWC[np.arange(size) % len(rows_BHWC)]


def open_network(path: str | Path, resize: str = "tf") -> Network:
    """Inception from pytorch-fid's `pt_inception` file (also as safetensors), or the classifier of a run of
    configs/classifier_openmoji.py. resize: of Inception's pictures, see `RESIZES`.

    ValueError for another kind of run or an unknown resize; ConversionError for a file that is no Inception's.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        found, meta = load_run(path)
        if meta["main"] != "classifier":
            raise ValueError(f"{path} is a run of {meta['config']['task']}; scores take a classifier's, or Inception")
        return _classifier(*found["classifier"])
    if resize not in RESIZES:
        raise ValueError(f"resize={resize!r} is unknown{tree.nearest(resize, RESIZES)}; use one of {list(RESIZES)}")
    if not path.is_file():
        raise checkpoint.CheckpointError(f"{path} is neither a run nor a file of weights")
    module = Inception()
    params = convert.from_torch(module, convert.read_arrays([path]))

    def apply(params: Any, image_BHWC: jax.Array) -> tuple[jax.Array, ...]:
        features = module.apply({"params": params}, resized(image_BHWC, inception.SIZE, resize))
        assert isinstance(features, inception.Features)
        return features.pool_BD, features.logits_BK, features.spatial_BD

    return Network(f"Inception {tree.fingerprint(params)}, resized as {resize}", params, apply)


def _classifier(module: Any, params: Any) -> Network:
    def apply(params: Any, image_BHWC: jax.Array) -> tuple[jax.Array, ...]:
        size = module.image_size
        x_BHWC = from_uint8(image_BHWC)
        if x_BHWC.shape[1:3] != (size, size):
            x_BHWC = jax.image.resize(x_BHWC, (len(x_BHWC), size, size, x_BHWC.shape[-1]), "bilinear", antialias=True)
        logits_BK, features_BD = module.apply({"params": params}, x_BHWC)
        return features_BD, logits_BK

    return Network(f"classifier {tree.fingerprint(params)} at {module.image_size} px", params, apply)


def resized(image_BHWC: jax.Array, size: int, how: str) -> jax.Array:
    """uint8 -> [-1, 1], bilinear, without antialiasing; see `RESIZES`."""
    x_BHWC = (image_BHWC.astype(jnp.float32) - 128.0) / 128.0 if how == "tf" else from_uint8(image_BHWC)
    rows, columns = (_bilinear(n, size, 0.0 if how == "tf" else 0.5) for n in x_BHWC.shape[1:3])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x_BHWC, precision="highest")


def _bilinear(n: int, size: int, centre: float) -> np.ndarray:
    """(size, n): the weights of n samples in each of `size`."""
    place = np.clip((np.arange(size) + centre) * n / size - centre, 0, n - 1)
    low = np.minimum(place.astype(int), n - 1)
    weights = np.zeros((size, n))
    np.add.at(weights, (np.arange(size), low), 1 - (place - low))
    np.add.at(weights, (np.arange(size), np.minimum(low + 1, n - 1)), place - low)
    return weights.astype(np.float32)
