"""The networks whose features are compared, opened by their path, and how pictures come to their size."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import checkpoint, convert, tree
from jdiff.evaluate.clip import open_clip
from jdiff.evaluate.features import Network
from jdiff.loading import load_run
from jdiff.models import inception
from jdiff.models.inception import Inception
from jdiff.pipelines import from_uint8

RESIZES = ("tf", "torch")
"""How Inception's pictures come to 299x299: bilinear with corners at 0 and pixels taken as (x - 128) / 128, as TensorFlow's graph
does it for the FID of the papers (TTUR's and ADM's code); or with pixels' centres at halves and x / 127.5 - 1, as pytorch-fid."""


def open_network(path: str | Path, resize: str = "tf") -> Network:
    """Inception from pytorch-fid's `pt_inception` file (also as safetensors), CLIP from its folder as transformers saves it, or
    the classifier of a run of configs/classifier_openmoji.py. resize: of Inception's pictures, see `RESIZES`.

    ValueError for another kind of run or an unknown resize; ConversionError for a file or folder that holds something else.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return open_clip(path)
    if (path / "checkpoints").is_dir():
        found, meta = load_run(path)
        if meta["main"] != "classifier":
            raise ValueError(
                f"{path} is a run of {meta['config']['task']}; scores take a classifier's, Inception or CLIP"
            )
        return _classifier(*found["classifier"])
    if resize not in RESIZES:
        raise ValueError(f"resize={resize!r} is unknown{tree.nearest(resize, RESIZES)}; use one of {list(RESIZES)}")
    if not path.is_file():
        raise checkpoint.CheckpointError(f"{path} is neither a run, nor CLIP's folder, nor a file of weights")
    module = Inception()
    params = convert.from_torch(module, convert.read_arrays([path]))

    def apply(params: Any, image_BHWC: jax.Array) -> tuple[jax.Array, ...]:
        features = module.apply({"params": params}, resized(image_BHWC, inception.SIZE, resize))
        assert isinstance(features, inception.Features)
        return features.pool_BD, features.logits_BK, features.spatial_BD

    title = f"Inception {tree.fingerprint(params)}, resized as {resize}"
    return Network(title, params, apply, ("pool_ND", "logits_NK", "spatial_ND"))


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
