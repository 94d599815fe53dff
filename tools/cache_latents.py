"""Encodes a data set once, so that training needs no VAE (and no text encoder).

    python tools/cache_latents.py IMAGENET/train CACHE --vae VAE --image-size 256
    python tools/cache_latents.py openmoji CACHE --vae runs/vae --image-size 64
    python tools/cache_latents.py captions:PATH CACHE --vae SD/vae --text SD --image-size 512

SRC is a folder of class folders, `openmoji` (or `openmoji:train`, `openmoji:heldout`), `captions:PATH` or `tfds:NAME`. VAE is
an AutoencoderKL's folder as diffusers saves it, or a jdiff run that trained one. With --text, a folder that holds text_encoder/
and tokenizer/ (or the files of both), captions are encoded too. Both mirror images are stored. A run that was stopped goes on
with the same command; the cache counts as finished when its meta.json is there.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jdiff import data
from jdiff.data import latents
from jdiff.data.packed import Texts
from jdiff.paths import whole

THREADS = 4
"""That decode pictures while the batch before is encoded."""


@dataclasses.dataclass(frozen=True)
class Vae:
    """encode: uint8 (B, H, W, 3) -> moments float32 (B, h, w, 2C). digest: of the model and its weights."""

    encode: Callable[[np.ndarray], np.ndarray]
    scaling_factor: float
    digest: str


@dataclasses.dataclass(frozen=True)
class Text:
    """tokens: one caption -> int32 (S,), ValueError when it is too long. encode: (B, S) -> float32 (B, S, E)."""

    tokens: Callable[[str], np.ndarray]
    encode: Callable[[np.ndarray], np.ndarray]
    digest: str


def load_vae(path: Path, batch_size: int) -> Vae:
    """An AutoencoderKL from diffusers' folder or a jdiff run, jitted for batches of `batch_size`."""
    import jax.numpy as jnp

    import jdiff
    from jdiff import convert

    if (path / "checkpoints").is_dir():
        module, params = jdiff.load(path)
    elif (path / "config.json").is_file():
        module, params = convert.load_component(path)
    else:
        raise ValueError(
            f"--vae {path} is neither a folder of diffusers' (config.json is missing) nor a run of jdiff's "
            "(checkpoints/ is missing)"
        )
    if type(module).__name__ != "AutoencoderKL":
        raise ValueError(f"--vae {path} holds {type(module).__name__}: give an AutoencoderKL's")

    def encode(params: Any, images_BHWC: Any) -> Any:
        posterior = module.apply({"params": params}, images_BHWC.astype(jnp.float32) / 127.5 - 1.0, method="encode")
        return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1).astype(jnp.float32)

    run, digest = on_devices(encode, module, params, batch_size)
    return Vae(run, float(module.scaling_factor), digest)


def load_text(path: Path, batch_size: int) -> Text:
    """A CLIPText and its tokenizer from a folder in transformers' layout, jitted for batches of `batch_size`."""
    import jax.numpy as jnp

    from jdiff import convert
    from jdiff.tokens import Tokenizer

    folders = [path / name if (path / name).is_dir() else path for name in ("text_encoder", "tokenizer")]
    module, params = convert.load_component(folders[0])
    if type(module).__name__ != "CLIPText":
        raise ValueError(f"--text {folders[0]} holds {type(module).__name__}: give a CLIP text model's")
    tokenizer = Tokenizer.from_folder(folders[1])

    def encode(params: Any, ids_BS: Any) -> Any:
        return module.apply({"params": params}, ids_BS).astype(jnp.float32)

    run, digest = on_devices(encode, module, params, batch_size)
    return Text(lambda caption: tokenizer([caption])[0], run, f"{digest}-{tokenizer.fingerprint}")


def on_devices(function: Any, module: Any, params: Any, batch_size: int) -> tuple[Callable[[np.ndarray], Any], str]:
    """`function(params, rows)` jitted, rows over all local devices, and a digest of the model with its weights.

    Fewer rows than `batch_size` are filled up with zeros, so that one shape is compiled.
    """
    import jax

    from jdiff import models, sharding, tree
    from jdiff.pipelines.rows import place

    mesh = sharding.make_mesh()
    if batch_size % mesh.size:
        raise ValueError(f"--batch-size {batch_size} does not divide over {mesh.size} devices")
    digest = tree.digest({**tree.checksums(params), "model": models.describe(module)})
    params = place(mesh, params)
    jitted = jax.jit(function)

    def run(rows: np.ndarray) -> np.ndarray:
        batch = np.zeros((batch_size, *rows.shape[1:]), rows.dtype)
        batch[: len(rows)] = rows
        return np.asarray(jitted(params, jax.device_put(batch, sharding.batch_sharding(mesh))))[: len(rows)]

    return run, digest


def open_pictures(src: str, image_size: int) -> data.Source:
    """SRC of the command line as a data source."""
    name, _, rest = src.partition(":")
    if name == "openmoji":
        return data.open_source("openmoji", image_size=image_size, split=rest or "all")
    if name in ("captions", "tfds"):
        return data.open_source(name, path=rest, image_size=image_size)
    return data.open_source("imagefolder", path=src, image_size=image_size)


def save(path: Path, array: np.ndarray) -> None:
    """An .npy file, whole or not at all."""
    with whole(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def pictures_at_once(image_size: int, devices: int) -> int:
    """A batch's pictures: 16 of 256 x 256 pixels, fewer of larger ones (on a CPU SD's VAE takes 0.6 GB for each of 512 x 512,
    both ways round twice that), and as many for each device, one at least."""
    return devices * max(1, 16 * 256**2 // max(256, image_size) ** 2 // devices)


def in_batches(items: Any, size: int) -> Iterator[Any]:
    """Slices of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def ahead(batches: Iterable[Any], read: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """`read` of each item of each batch, by threads, one batch ahead of the one that is given out."""
    with ThreadPoolExecutor(THREADS) as pool:
        pending: list[Any] = []
        for batch in batches:
            coming = [pool.submit(read, item) for item in batch]
            if pending:
                yield [future.result() for future in pending]
            pending = coming
        yield [future.result() for future in pending]


@dataclasses.dataclass
class Cache:
    """What is being made: the pictures, the models, and where it goes; files of a shard are written when it is whole."""

    source: Any
    vae: Vae
    text: Text | None
    dest: Path
    batch_size: int
    dtype: str
    skipped: int = 0

    def paths(self, shard: int) -> dict[str, Path]:
        """The files of a shard."""
        names = ["moments", "labels", *(["captions"] if self.source.has_captions else [])]
        paths = {
            name: latents.shard_path(self.dest, shard, name) for name in [*names, *(["context"] if self.text else [])]
        }
        return {name: path.with_suffix(".npz") if name == "captions" else path for name, path in paths.items()}

    def read(self, index: int) -> dict[str, Any] | data.BrokenRecord:
        """A picture's record with all its captions and their tokens, or what is wrong with it."""
        try:
            record = self.source.read(index, False, np.random.default_rng(index))
            texts = self.source.texts(index) if self.source.has_captions else []
        except data.BrokenRecord as error:
            return error
        try:
            tokens = [self.text.tokens(text) for text in texts] if self.text else []
        except ValueError as error:
            return data.BrokenRecord(f"record {index}, {record['caption']!r}", " ".join(str(error).split()))
        return {**record, "texts": texts, "tokens": tokens}

    def make(self, shard: int, indices: range, bar: tqdm) -> None:
        """Encodes one shard."""
        moments, labels, texts, tokens = [], [], [], []
        for batch in ahead(in_batches(indices, self.batch_size), self.read):
            for error in (found for found in batch if isinstance(found, data.BrokenRecord)):
                self.skipped += 1
                tqdm.write(f"skipped {error.where}: {error.reason}", file=sys.stderr)
            records = [found for found in batch if not isinstance(found, data.BrokenRecord)]
            if records:
                both = np.stack([(r["image"], r["image"][:, ::-1]) for r in records])
                encoded = self.vae.encode(both.reshape(-1, *both.shape[2:]))
                moments.append(encoded.reshape(len(records), 2, *encoded.shape[1:]))
            labels += [record["label"] for record in records]
            texts += [record["texts"] for record in records]
            tokens += [ids for record in records for ids in record["tokens"]]
            bar.update(len(batch))
        paths = self.paths(shard)
        contexts = [self.text.encode(np.stack(ids)) for ids in in_batches(tokens, self.batch_size)] if self.text else []
        arrays = {"moments": moments or [np.zeros((0, 2, *self.shape()), np.float32)]}
        if self.text:
            arrays["context"] = contexts or [self.null_context()[None][:0]]
        for name, parts in arrays.items():
            array = np.concatenate(parts).astype(self.dtype)
            if not np.isfinite(array).all():
                raise ValueError(f"{name} of shard {shard} are not finite in {self.dtype}: use --dtype float32")
            save(paths[name], array)
        if self.source.has_captions:
            with whole(paths["captions"]) as partial:
                Texts(texts).save(partial)
        save(paths["labels"], np.asarray(labels, np.int32))

    def shape(self) -> tuple[int, int, int]:
        """(h, w, 2C) of the moments."""
        return self.vae.encode(np.zeros((1, *self.source.shape), np.uint8)).shape[1:]

    def null_context(self) -> np.ndarray:
        """The empty caption's (S, E)."""
        assert self.text is not None
        return self.text.encode(self.text.tokens("")[None])[0]


def fit_preview(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The least-squares map latents (…, C) -> RGB in [-1, 1], with a constant: (C + 1, 3)."""
    z = np.concatenate([z.reshape(-1, z.shape[-1]) for z, _ in pairs])
    rgb = np.concatenate([rgb.reshape(-1, 3) for _, rgb in pairs])
    return np.linalg.lstsq(np.concatenate([z, np.ones((len(z), 1))], axis=1), rgb, rcond=None)[0]


def preview_pair(cache: Cache, indices: range, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scaled latents of a shard's first pictures, and those pictures shrunk to the latents' resolution."""
    from PIL import Image

    size, small = (moments.shape[2], moments.shape[1]), []
    for index in indices:
        if len(small) == len(moments):
            break
        record = cache.read(index)
        if not isinstance(record, data.BrokenRecord):
            image = Image.fromarray(np.ascontiguousarray(record["image"])).resize(size, Image.Resampling.BOX)
            small.append(np.asarray(image, np.float32) / 127.5 - 1)
    return moments[..., : moments.shape[-1] // 2] * cache.vae.scaling_factor, np.stack(small)


def prepare(dest: Path, job: dict[str, Any]) -> None:
    """Makes `dest` a cache's folder for this job; ValueError when it holds something else."""
    dest.mkdir(parents=True, exist_ok=True)
    job_file = dest / "job.json"
    if job_file.exists() and json.loads(job_file.read_text()) != job:
        raise ValueError(f"{dest} holds another cache ({job_file} differs from this command's): choose another folder")
    # but for what a start that was killed at once has left
    if not job_file.exists() and any(not path.name.startswith(".") for path in dest.iterdir()):
        raise ValueError(f"{dest} holds other files: choose another folder")
    with whole(job_file) as partial:
        partial.write_text(json.dumps(job))


def run(options: argparse.Namespace) -> None:
    """Encodes all of the source, going on from the shards that are there."""
    dest: Path = options.dest
    source = open_pictures(options.src, options.image_size)
    if options.text and not source.has_captions:
        raise ValueError(f"--text: {options.src} has no captions to encode")
    vae = load_vae(options.vae, 2 * options.batch_size)
    text = load_text(options.text, options.batch_size) if options.text else None
    job = {"source": source.fingerprint, "vae": vae.digest, "shard_size": options.shard_size, "dtype": options.dtype}
    job |= {"text": text.digest} if text else {}
    prepare(dest, job)
    cache = Cache(source, vae, text, dest, options.batch_size, options.dtype)
    counts, texts, contexts, labels, pairs = [], [], [], [], []
    shards = list(in_batches(range(len(source)), options.shard_size))
    with tqdm(total=len(source), unit="image", desc="encoding") as bar:
        for shard, indices in enumerate(shards):
            paths = cache.paths(shard)
            if all(path.exists() for path in paths.values()):
                bar.update(len(indices))
            else:
                cache.make(shard, indices, bar)
            stored = np.load(paths["moments"], mmap_mode="r")
            counts.append(len(stored))
            labels.append(np.load(paths["labels"]))
            if source.has_captions:
                own = Texts.load(paths["captions"])
                texts += [own.of(i) for i in range(len(own))]
            if text:
                contexts.append(len(np.load(paths["context"], mmap_mode="r")))
            if len(pairs) < 16 and len(stored):
                pairs.append(preview_pair(cache, indices, np.asarray(stored[:64, 0], np.float32)))
    everything = np.concatenate(labels)
    if not len(everything):
        raise ValueError(f"{options.src}: not one picture could be read")
    save(dest / "labels.npy", everything)
    h, w, c2 = cache.shape()
    meta = {
        "format": latents.FORMAT,
        "shape": (h, w, c2 // 2),
        "scaling_factor": vae.scaling_factor,
        "class_names": list(source.class_names),
        "shard_counts": counts,
        "dtype": options.dtype,
        "image_size": options.image_size,
        "vae": vae.digest,
        "captions": source.has_captions,
        "fingerprint": hashlib.sha256(json.dumps([job, counts]).encode()).hexdigest()[:16],
        "preview": fit_preview(pairs).tolist(),
    }
    if source.has_captions:
        with whole(dest / "captions.npz") as partial:
            Texts(texts).save(partial)
    if text:
        null = cache.null_context()
        save(dest / "null_context.npy", null)
        meta["context"] = {"shape": null.shape, "shard_counts": contexts, "text": text.digest}
    with whole(dest / "meta.json") as partial:
        partial.write_text(json.dumps(meta, indent=1))
    spread = float(np.concatenate([z.reshape(-1) for z, _ in pairs]).std())
    print(
        f"{len(everything):,} pictures, {cache.skipped} skipped, latents {h} x {w} x {c2 // 2}, whose means times the scaling "
        f"factor of {vae.scaling_factor:.4g} have a standard deviation of {spread:.3g} (near 1 is well): {dest}"
    )


def main() -> int:
    """Parses, encodes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="a folder of class folders, openmoji[:SPLIT], captions:PATH or tfds:NAME")
    parser.add_argument("dest", type=Path, help="the cache's folder")
    parser.add_argument("--vae", type=Path, required=True, help="an AutoencoderKL folder, or a run that trained one")
    parser.add_argument(
        "--text", type=Path, help="a folder with text_encoder/ and tokenizer/: captions are encoded too"
    )
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument(
        "--batch-size", type=int, help="pictures, each of which is encoded both ways round (default: 16 of 256x256)"
    )
    parser.add_argument("--shard-size", type=int, default=4096, help="pictures a file")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    options = parser.parse_args()
    import jax

    from jdiff import runtime

    runtime.prepare()
    if options.batch_size is None:
        options.batch_size = pictures_at_once(options.image_size, jax.device_count())
    try:
        run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"cache_latents.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
