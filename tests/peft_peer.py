"""peft's adapters in PyTorch models, with random numbers, and the same ones as jdiff's trees."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model

from jdiff import tree

Array = Any
RANK, ALPHA = 4, 6


def inject(peer: torch.nn.Module, modules: Sequence[str], name: str = "default", seed: int = 0, **settings) -> None:
    """Adapters at the modules whose names end so, in place; neither factor is zero, and magnitudes are not the norms."""
    config = LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": list(modules), **settings})
    vars(peer).pop("peft_config", None)  # left by an adapter before, which stays or is replaced
    inject_adapter_in_model(config, peer, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, value in peer.named_parameters():
            if name not in path.split("."):
                continue
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            value.copy_(value * (1 + 0.2 * noise.abs()) if "magnitude" in path else 0.2 * noise)
    peer.eval()


def adapters(
    peer: torch.nn.Module, path_of: Callable[[str], str], name: str = "default", of: Callable[[Any], Any] = lambda p: p
) -> dict[str, dict[str, Array]]:
    """jdiff's arrays by `path_of(module's name)`. of: what is taken of each parameter, itself or its gradient."""
    array = lambda p: of(p).detach().numpy()  # noqa: E731
    found = {}
    for module_name, module in peer.named_modules():
        if name not in getattr(module, "scaling", {}):
            continue
        if name in module.lora_embedding_A:
            a, b = (array(factors[name]).T for factors in (module.lora_embedding_A, module.lora_embedding_B))
        else:
            a, b = (array(factors[name].weight) for factors in (module.lora_A, module.lora_B))
            a, b = (a.T, b.T) if a.ndim == 2 else (a.transpose(2, 3, 1, 0), b[:, :, 0, 0].T)
        parts = {"a": a, "b": b, "scale": np.asarray(module.scaling[name], a.dtype)}
        if name in module.lora_magnitude_vector:
            parts["magnitude"] = array(module.lora_magnitude_vector[name].weight).reshape(-1)
        found[path_of(module_name)] = parts
    return found


def slashed(name: str) -> str:
    """`down_blocks.0.attn1.to_out.0` -> `down_blocks_0/attn1/to_out_0/kernel`; of transformers' CLIP too."""
    name = re.sub(r"\.(\d+)", r"_\1", re.sub(r"^(text_model\.)?(encoder|embeddings)\.", "", name))
    return name.replace(".", "/") + ("/embedding" if name.endswith("token_embedding") else "/kernel")


def stacked(layers: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """One adapter of layers in a row."""
    return {part: np.stack([layer[part] for layer in layers]) for part in layers[0]}


def fused(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """One adapter of kernels that stand side by side: b is block-diagonal, and every rank has its own scale."""
    b = np.zeros((sum(p["b"].shape[0] for p in parts), sum(p["b"].shape[1] for p in parts)), parts[0]["b"].dtype)
    row = column = 0
    for part in parts:
        rows, columns = part["b"].shape
        b[row : row + rows, column : column + columns] = part["b"]
        row, column = row + rows, column + columns
    joined = {
        "a": np.concatenate([p["a"] for p in parts], -1),
        "b": b,
        "scale": np.concatenate([np.full(p["a"].shape[-1], p["scale"]) for p in parts]),
    }
    if "magnitude" in parts[0]:
        joined["magnitude"] = np.concatenate([p["magnitude"] for p in parts])
    return joined


def of_dit(found: Mapping[str, Mapping[str, Array]], depth: int) -> dict[str, Any]:
    """diffusers' adapters of a DiT, by its own names, as our stacked tree; q, k and v are one kernel of ours."""
    names = {"attn/proj": "attn1.to_out.0", "mlp/fc1": "ff.net.0.proj", "mlp/fc2": "ff.net.2"}
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    paths = {
        f"blocks/{ours}/kernel": stacked([found[f"{b}.{theirs}"] for b in blocks]) for ours, theirs in names.items()
    }
    qkv = [fused([found[f"{b}.attn1.to_{x}"] for x in "qkv"]) for b in blocks]
    return tree.nested({**paths, "blocks/attn/qkv/kernel": stacked(qkv), "x_embedder/kernel": found["pos_embed.proj"]})
