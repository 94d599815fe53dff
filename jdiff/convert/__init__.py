"""Between PyTorch checkpoints and parameter trees: names and layouts by table, strictly, both ways. Nothing imports torch."""

from jdiff.convert import lora
from jdiff.convert.bundle import Bundle, Part, from_models, read
from jdiff.convert.export import write
from jdiff.convert.files import from_torch, load_component, put, read_arrays, read_config, to_torch
from jdiff.convert.hub import locate
from jdiff.convert.rows import ConversionError

__all__ = [
    "Bundle",
    "ConversionError",
    "Part",
    "from_models",
    "from_torch",
    "load_component",
    "locate",
    "lora",
    "put",
    "read",
    "read_arrays",
    "read_config",
    "to_torch",
    "write",
]
