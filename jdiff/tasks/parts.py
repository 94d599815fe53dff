"""What a text task starts from: its models, with the weights that they have already, and its tokenizer."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdiff import checkpoint, models, tree
from jdiff import config as configs
from jdiff.convert.arrays import is_float
from jdiff.data import BrokenRecord, Source
from jdiff.loading import Opened, open_checkpoint, tokenizer_folder
from jdiff.paths import whole
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
        """The weights in float32, but integers as they are; {} when it starts untrained."""
        wide = lambda x: np.asarray(x, np.float32 if is_float(x.dtype) else x.dtype)  # noqa: E731
        return {} if self.read is None else jax.tree.map(wide, self.read())


def open_base(config: Any, dtype: Any = None) -> Opened:
    """init_from's checkpoint. ValueError when it is quantized, and not for adapters alone, or has learned scales."""
    base = open_checkpoint(config.init_from, dtype=dtype)
    if base.quantized is not None and not config.lora.rank:
        raise ValueError(
            f"init_from={config.init_from} is quantized ({base.quantized.recipe}) and cannot be trained itself: train adapters "
            "over it (--config.lora.rank=8), or give the checkpoint that it was made from"
        )
    if base.scales is not None:
        raise ValueError(
            f"init_from={config.init_from} has learned scales, without which its kernels are not what was trained: resume it in "
            "its own folder, or train adapters over its copy (tools/quantize.py)"
        )
    return base


def part_of(opened: Opened, name: str, path: str) -> Part:
    """A model of an opened checkpoint, with its weights. ValueError, naming `path`, when it has none of that name."""
    if name not in opened.models:
        raise ValueError(f"{path} holds no {name}, which is needed; it holds {', '.join(opened.models)}")
    module, params = opened.models[name]
    return Part(module, lambda: jax.tree.map(np.asarray, params))


def refuse_sizes(config: Any, groups: tuple[str, ...], free: tuple[str, ...] = ()) -> None:
    """ValueError for a key of these groups ("unet.") that asks for a size of its own where init_from's models have theirs.
    free: keys that may be set all the same."""
    now, default = configs.flat(config.to_dict()), configs.flat(configs.default(config.task))
    for key in now:
        if key.startswith(groups) and key not in free and now[key] != default[key]:
            raise ValueError(
                f"{key}={now[key]} cannot be had with init_from={config.init_from}, whose models have their own sizes"
            )


def open_vae(path: str | None, base: Opened | None, base_path: str | None, dtype: Any) -> Part:
    """The autoencoder at `path`, any checkpoint of one; the base's when there is no path.

    ValueError when there is neither, or it is something else.
    """
    if path is None:
        if base is None or base_path is None:
            raise ValueError(
                "vae.path is missing: give a run that trained an autoencoder, or a diffusers vae folder, or set init_from"
            )
        return part_of(base, "vae", f"init_from={base_path}")
    return part_of(open_checkpoint(path, dtype=dtype), "vae", f"vae.path={path}")


def find_tokenizer(config: Any, base: Opened | None, source: Source, workdir: Path | None) -> Tokenizer:
    """The run's own tokenizer when it has checkpoints; else the base's, or one learnt from all captions of the source.

    A run keeps it in WORKDIR/tokenizer; ValueError when it is lost, or when the base has none.
    """
    kept = None if workdir is None else workdir / "tokenizer"
    if kept is not None and checkpoint.steps(kept.parent):
        if not kept.is_dir():
            raise ValueError(f"{kept} is missing, and the run's text encoder knows no other: put it back")
        return Tokenizer.from_folder(kept)
    if base is None:
        tokenizer = Tokenizer.train(captions(source), config.text.vocab_size, config.text.max_length)
    elif base.tokenizer is not None:
        tokenizer = base.tokenizer
    elif config.text.tokenizer is not None:
        tokenizer = Tokenizer.from_folder(tokenizer_folder(config.text.tokenizer))
    else:
        raise ValueError(
            f"init_from={config.init_from} holds no tokenizer: set text.tokenizer, its folder or the hub's "
            "openai/clip-vit-large-patch14"
        )
    if kept is not None and jax.process_index() == 0:
        shutil.rmtree(kept, ignore_errors=True)  # of a start that did not come to a checkpoint
        with whole(kept) as partial:
            tokenizer.save(partial)
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
