"""The README.md of an export: what it is, what it came from, how it is opened."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jdiff import tree
from jdiff.version import __version__

if TYPE_CHECKING:
    from jdiff.convert.bundle import Bundle

_CLASSES = {"dit": "DiT", "unet": "UNet", "vae": "autoencoder", "text": "text encoder", "clip": "CLIP"}


def card(bundle: "Bundle", hashes: Mapping[str, str], title: str, dtype: Any, component: bool) -> str:
    """A model card in Markdown, its front matter as the Hugging Face hub reads it. title: what the source is called."""
    kinds = ", ".join(_CLASSES[name] for name in bundle.parts)
    library = "transformers" if component and bundle.main in ("text", "clip") else "diffusers"
    rows = [
        f"| {_CLASSES[name]} | {tree.count(part.params):,} | {np.dtype(dtype or part.dtype).name} |"
        for name, part in bundle.parts.items()
    ]
    origin = f"{title or 'a checkpoint'} ({bundle.format or 'jdiff'})"
    lines = [
        *("---", f"library_name: {library}", "tags:", "- jdiff", f"- {library}", "---", ""),
        *(f"# {title or 'Converted weights'}", ""),
        f"{kinds[0].upper()}{kinds[1:]}, converted from {origin} by jdiff {__version__}. The weights are the source's, bit for bit "
        "unless a dtype is named that it did not have; its licence applies.",
        *("", "| model | parameters | dtype |", "|---|---|---|", *rows),
        *("", "| file | sha256 |", "|---|---|", *(f"| `{name}` | `{digest}` |" for name, digest in hashes.items())),
        *("", "```python", *_opening(bundle, component), "```"),
    ]
    if "dit" in bundle.parts and not bundle.parts["dit"].module.freq_shift:
        lines += [
            "",
            "diffusers forms DiT's timestep frequencies with 127 where the official code has 128: its outputs from these weights "
            "differ a little from the official code's.",
        ]
    return "\n".join(lines) + "\n"


def _opening(bundle: "Bundle", component: bool) -> list[str]:
    if not component:
        return ["import jdiff", "", 'pipe = jdiff.pipeline("PATH")  # or diffusers\' DiffusionPipeline.from_pretrained']
    return ["import jdiff", "", 'model, params = jdiff.load("PATH")']
