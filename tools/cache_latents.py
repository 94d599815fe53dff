"""Encodes a data set once, so that training needs no VAE.

    python tools/cache_latents.py IMAGENET/train CACHE --vae VAE_FOLDER --image-size 256
    python tools/cache_latents.py openmoji CACHE --vae VAE_FOLDER --image-size 64

SRC is a folder of class folders, `openmoji`, or `tfds:NAME`. VAE_FOLDER is an AutoencoderKL as diffusers saves it; for now it
runs in PyTorch (pip install 'jax-jdiff[test]'), until jdiff's own VAE stands. Both mirror images are stored. A run that was
stopped goes on with the same command; the cache counts as finished when its meta.json is there.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jdiff import data
from jdiff.data import latents

Encoder = Callable[[np.ndarray], np.ndarray]


def load_encoder(path: Path) -> tuple[Encoder, float, str]:
    """(uint8 (B, H, W, 3) -> moments float32 (B, h, w, 2C), the scaling factor, a hash of the weights)."""
    if not (path / "config.json").is_file():
        raise ValueError(f"--vae {path} is no AutoencoderKL folder of diffusers: config.json is missing")
    try:
        import torch
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError("encoding needs torch and diffusers for now: pip install 'jax-jdiff[test]'") from error
    vae = AutoencoderKL.from_pretrained(str(path), low_cpu_mem_usage=False).eval().requires_grad_(False)

    def encode(images_BHWC: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images_BHWC.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)
        moments = vae.encode(x).latent_dist.parameters
        return moments.numpy().transpose(0, 2, 3, 1)

    if vae.config.get("shift_factor"):
        raise ValueError(f"--vae {path} shifts its latents, which no model of jdiff's does")
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin")):
        digest.update(file.read_bytes())
    return encode, float(vae.config["scaling_factor"]), digest.hexdigest()[:16]


def open_pictures(src: str, image_size: int) -> data.Source:
    """SRC of the command line as a data source."""
    if src == "openmoji":
        return data.open_source("openmoji", image_size=image_size)
    name, _, rest = src.partition(":")
    return data.open_source(
        "tfds" if name == "tfds" else "imagefolder", path=rest if name == "tfds" else src, image_size=image_size
    )


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Writes beside `path`, then renames: the file is there whole or not at all."""
    partial_path = path.with_name("writing-" + path.name)
    write(partial_path)
    os.replace(partial_path, path)


def fit_preview(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The least-squares map latents (…, C) -> RGB in [-1, 1], with a constant: (C + 1, 3)."""
    z = np.concatenate([z.reshape(-1, z.shape[-1]) for z, _ in pairs])
    rgb = np.concatenate([rgb.reshape(-1, 3) for _, rgb in pairs])
    return np.linalg.lstsq(np.concatenate([z, np.ones((len(z), 1))], axis=1), rgb, rcond=None)[0]


def cache(src: str, dest: Path, vae: Path, image_size: int, batch_size: int, shard_size: int, dtype: str) -> None:
    """Encodes all of `src` into `dest`, going on from the shards that are there."""
    source = open_pictures(src, image_size)
    encode, scale, vae_hash = load_encoder(vae)
    job = {"source": source.fingerprint, "vae": vae_hash, "shard_size": shard_size, "dtype": dtype}
    dest.mkdir(parents=True, exist_ok=True)
    job_file = dest / "job.json"
    if job_file.exists() and json.loads(job_file.read_text()) != job:
        raise ValueError(f"{dest} holds another cache ({job_file} differs from this command's): choose another folder")
    if not job_file.exists() and any(dest.iterdir()):
        raise ValueError(f"{dest} holds other files: choose another folder")
    write_whole(job_file, lambda path: path.write_text(json.dumps(job)))
    _, h, w, c2 = encode(np.zeros((1, *source.shape), np.uint8)).shape
    counts, labels, pairs, broken = [], [], [], 0
    rng = np.random.default_rng(0)
    with tqdm(total=len(source), unit="image", desc="encoding") as bar:
        for shard, first in enumerate(range(0, len(source), shard_size)):
            path, label_path = latents.shard_path(dest, shard), dest / f"labels-{shard:05d}.npy"
            indices = range(first, min(first + shard_size, len(source)))
            if not (path.exists() and label_path.exists()):
                moments, kept = [], []
                for start in range(0, len(indices), batch_size):
                    images = []
                    for index in indices[start : start + batch_size]:
                        try:
                            record = source.read(index, False, rng)
                        except data.BrokenRecord as error:
                            broken += 1
                            tqdm.write(f"skipped {error.where}: {error.reason}", file=sys.stderr)
                            continue
                        images.append(record["image"])
                        kept.append(record["label"])
                    if images:
                        both = np.stack([images, [image[:, ::-1] for image in images]], axis=1)
                        encoded = encode(both.reshape(-1, *both.shape[2:]))
                        moments.append(encoded.reshape(len(images), 2, *encoded.shape[1:]).astype(dtype))
                    bar.update(min(batch_size, len(indices) - start))
                stacked = np.concatenate(moments) if moments else np.zeros((0, 2, h, w, c2), dtype)
                if not np.isfinite(stacked).all():
                    raise ValueError(f"latents of shard {shard} are not finite in {dtype}: use --dtype float32")
                write_whole(path, lambda p, a=stacked: _save(p, a))
                write_whole(label_path, lambda p, a=kept: _save(p, np.asarray(a, np.int32)))
            else:
                bar.update(len(indices))
            stored = np.load(path, mmap_mode="r")
            counts.append(len(stored))
            labels.append(np.load(label_path))
            if len(pairs) < 16 and len(stored):
                pairs.append(_preview_pair(source, indices, np.asarray(stored[:64, 0], np.float32), scale, rng))
    everything = np.concatenate(labels)
    if not len(everything):
        raise ValueError(f"{src}: not one picture could be read")
    write_whole(dest / "labels.npy", lambda path: _save(path, everything))
    meta = {
        "format": latents.FORMAT,
        "shape": (h, w, c2 // 2),
        "scaling_factor": scale,
        "class_names": list(source.class_names),
        "shard_counts": counts,
        "dtype": dtype,
        "image_size": image_size,
        "vae": vae_hash,
        "fingerprint": hashlib.sha256(json.dumps([job, counts]).encode()).hexdigest()[:16],
        "preview": fit_preview(pairs).tolist(),
    }
    write_whole(dest / "meta.json", lambda path: path.write_text(json.dumps(meta, indent=1)))
    print(f"{len(everything):,} pictures, {broken} skipped, latents {h} x {w} x {c2 // 2}: {dest}")


def _preview_pair(source, indices, moments, scale, rng):
    """Scaled latents of a shard's first pictures, and those pictures shrunk to the latents' resolution."""
    from PIL import Image

    pictures = []
    for index in indices:
        if len(pictures) == len(moments):
            break
        try:
            pictures.append(source.read(index, False, rng)["image"])
        except data.BrokenRecord:
            continue
    size = (moments.shape[2], moments.shape[1])
    small = [
        np.asarray(Image.fromarray(np.asarray(p)).resize(size, Image.Resampling.BOX), np.float32) / 127.5 - 1
        for p in pictures
    ]
    return moments[..., : moments.shape[-1] // 2] * scale, np.stack(small)


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def main() -> int:
    """Parses, encodes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="a folder of class folders, openmoji, or tfds:NAME")
    parser.add_argument("dest", type=Path, help="the cache's folder")
    parser.add_argument("--vae", type=Path, required=True, help="an AutoencoderKL folder")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--shard-size", type=int, default=4096, help="pictures a file")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    options = parser.parse_args()
    try:
        o = options
        cache(o.src, o.dest, o.vae, o.image_size, o.batch_size, o.shard_size, o.dtype)
    except (ValueError, OSError) as error:
        print(f"cache_latents.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
