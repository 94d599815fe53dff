"""Between PyTorch checkpoints and parameter trees: names and layouts by table, strictly, both ways."""

from jdiff.convert.engine import from_torch, to_torch
from jdiff.convert.files import load_component, read_arrays, read_config

__all__ = ["from_torch", "load_component", "read_arrays", "read_config", "to_torch"]
