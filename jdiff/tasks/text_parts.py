"""What a text task starts from: its models, with the weights that they have already, and its tokenizer."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdiff import checkpoint, convert, models, tree
from jdiff.convert.files import read_json
from jdiff.data import BrokenRecord, Source
from jdiff.loading import load
from jdiff.tokens import Tokenizer


@dataclasses.dataclass(frozen=True)
class Part:
    """A model, and what reads its weights, a tree of numpy arrays as they are stored. read None: it starts untrained."""

    module: Any
    read: Callable[[], Any] | None = None

    def digest(self) -> str:
        """Sixteen hex digits of model and weights, as tools/cache_latents.py takes them down."""
        assert self.read is not None
        return tree.digest({**tree.checksums(self.read()), "model": models.describe(self.module)})

    def weights(self) -> Any:
        """The weights in float32, {} when it starts untrained."""
        return {} if self.read is None else jax.tree.map(lambda x: np.asarray(x, np.float32), self.read())


def from_folder(folder: Path, kind: str, dtype: Any) -> Part:
    """A diffusers or transformers component folder, whose weights are read when they are asked for.

    kind: the class that it must be. ConversionError for a folder that is none, ValueError for another class.
    """
    module = models.from_config(convert.read_config(folder), dtype)
    if type(module).__name__ != kind:
        raise ValueError(f"{folder} holds a {type(module).__name__}, where {kind} is needed")
    return Part(module, lambda: convert.load_component(folder)[1])


def open_vae(path: str | None, base: Path | None, dtype: Any) -> Part:
    """The autoencoder at `path`, a run that trained one or a component folder; the base's when there is no path.

    ValueError when there is neither, or it is something else.
    """
    if path is None and base is None:
        raise ValueError(
            "vae.path is missing: give a run that trained an autoencoder, or a diffusers vae folder, or set base"
        )
    folder = base / "vae" if path is None and base is not None else Path(str(path))
    if not (folder / "checkpoints").is_dir():
        return from_folder(folder, "AutoencoderKL", dtype)
    module, params = load(folder)
    if type(module).__name__ != "AutoencoderKL":
        raise ValueError(f"vae.path={path} is a run of a {type(module).__name__}, where AutoencoderKL is needed")
    params = jax.device_get(params)
    return Part(module.clone(dtype=dtype), lambda: params)


def base_scheduler(base: Path | None) -> dict[str, Any] | None:
    """The base's scheduler_config.json; None when it has none. ValueError for a file that cannot be read."""
    file = None if base is None else base / "scheduler" / "scheduler_config.json"
    return None if file is None or not file.is_file() else read_json(file)


def find_tokenizer(settings: Mapping[str, Any], base: Path | None, source: Source, workdir: Path | None) -> Tokenizer:
    """The run's own tokenizer when it has checkpoints; else the base's, or one learnt from all captions of the source.

    settings: a config's `text`. A run keeps it in WORKDIR/tokenizer; ValueError when it is lost.
    """
    kept = None if workdir is None else workdir / "tokenizer"
    if kept is not None and checkpoint.steps(kept.parent):
        if not kept.is_dir():
            raise ValueError(f"{kept} is missing, and the run's text encoder knows no other: put it back")
        return Tokenizer.from_folder(kept)
    if base is not None:
        tokenizer = Tokenizer.from_folder(base / "tokenizer")
    else:
        tokenizer = Tokenizer.train(captions(source), settings["vocab_size"], settings["max_length"])
    if kept is not None and jax.process_index() == 0:
        shutil.rmtree(kept, ignore_errors=True)  # of a start that did not come to a checkpoint
        partial_path = kept.with_name("tokenizer.tmp")
        shutil.rmtree(partial_path, ignore_errors=True)
        tokenizer.save(partial_path)
        os.replace(partial_path, kept)
    return tokenizer


def captions(source: Any) -> list[str]:
    """All captions of a source, in its order; those of broken records are left out."""
    found = []
    for index in range(len(source)):
        try:
            found += source.texts(index)
        except BrokenRecord:  # the reader will say so
            continue
    return found
