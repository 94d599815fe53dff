"""What the arrays of an adapter's file are called by peft, by diffusers and by kohya's scripts, and what files are no LoRA's."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Literal

from jdiff.convert.bundle import COMPONENTS
from jdiff.convert.export import FOLDERS
from jdiff.convert.rows import refuse

Format = Literal["peft", "diffusers", "kohya"]
FORMATS: tuple[Format, ...] = ("peft", "diffusers", "kohya")
PEFT = "base_model.model."
KOHYA = {"unet": "lora_unet_", "text": "lora_te_"}
"""What kohya's names begin with, by model. (Tools that know SDXL write `lora_te1_` for the one text encoder, too.)"""
PREFIXES: dict[Format, dict[str, str]] = {
    "peft": {PEFT: ""},
    "diffusers": {**{f"{folder}.": model for folder, model in COMPONENTS.items()}, "": ""},
    "kohya": {**{prefix: model for model, prefix in KOHYA.items()}, "lora_te1_": "text"},
}
"""What a name begins with -> the model; "" where that is not said."""

# peft of several years, and states saved without its own function, spell the adapter's name `default` or leave it out
_PEFT = (
    r"(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight",
    r"(?P<module>.+)\.lora_(?P<table>embedding)_(?P<part>[AB])(\.default)?",
    r"(?P<module>.+)\.lora_(?P<part>magnitude)_vector(\.default)?(\.weight)?",
)
_PATTERNS: dict[Format, tuple[str, ...]] = {
    "peft": _PEFT,
    "diffusers": (
        *_PEFT,
        r"(?P<module>.+)\.(lora|lora_linear_layer)\.(?P<part>down|up)\.weight",
        r"(?P<oldest>.+\.to_(q|k|v|out))_lora\.(?P<part>down|up)\.weight",
        r"(?P<module>.+)\.(?P<part>alpha)",
    ),
    "kohya": (
        r"(?P<module>[^.]+)\.lora_(?P<part>down|up)\.weight",
        r"(?P<module>[^.]+)\.(?P<part>alpha|dora_scale)",
    ),
}
_PARTS = {
    "A": "a",
    "B": "b",
    "down": "a",
    "up": "b",
    "alpha": "alpha",
    "magnitude": "magnitude",
    "dora_scale": "magnitude",
}
_PARTNERS = (
    ("lora_A.", "lora_B."),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_down.", "lora_up."),
    (".down.", ".up."),
)

OTHERS = (
    (r".*[._]hada_.*", "a LoHa (products of factors, element by element)"),
    (r".*[._]lokr_.*", "a LoKr (Kronecker products)"),
    (r".*\.lora_mid\.weight", "a LoCon in Tucker's form, with a third factor lora_mid"),
    (r".*\.(oft_blocks|oft_diag|oft_R|boft_R|oft_r|boft_r)(\..*)?", "an OFT (rotations)"),
    (r".*\.(on_input|ia3_l)(\..*)?", "an IA3 (factors of activations)"),
    (r".*\.(a1|a2|b1|b2)\.weight", "a GLoRA"),
    (r"lora_.*\.(diff|diff_b|w_norm|b_norm|scalar)", "a LyCORIS of whole differences, norms or trained factors"),
    (r".*\.lora_B(\.default)?\.bias", "a LoRA with biases of its own (peft's lora_bias)"),
    (r"(lora_te[23]_|text_encoder_[23]\.).*", "a LoRA for a model with a second text encoder (SDXL, SD 3)"),
    (
        r"(lora_controlnet|controlnet_|control_model\.|zero_convs\.|input_hint_block\.|middle_block_out\.).*",
        "a ControlNet or its LoRA",
    ),
    (r"(image_proj|ip_adapter)(\..*)?", "an IP-Adapter"),
    (
        r"(string_to_token|string_to_param|emb_params|clip_[lg])|<.*>",
        "a textual inversion (words' embeddings, which change no layer)",
    ),
    (
        r"(model\.diffusion_model|first_stage_model|cond_stage_model|model_ema)\..*|state_dict|ema",
        "a whole checkpoint, no adapter",
    ),
)
"""Regex of an array's name -> what a file with such a name is, none of which jdiff reads."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What a name says. model: ours, or "". module: the checkpoint's, its dots underscores in kohya's files. part: a, b, alpha
    or magnitude. table: of an embedding table."""

    model: str
    module: str
    part: str
    table: bool = False


def told(names: Iterable[str]) -> Format:
    """The format that names are of, from how they begin."""
    names = list(names)
    if any(name.startswith(PEFT) for name in names):
        return "peft"
    return "kohya" if any(name.startswith(tuple(PREFIXES["kohya"])) for name in names) else "diffusers"


def parse(name: str, form: Format) -> Key | None:
    """What a name says in that format; None when it is none of an adapter's."""
    for prefix, model in PREFIXES[form].items():
        if not name.startswith(prefix):
            continue
        for pattern in _PATTERNS[form]:
            if match := re.fullmatch(pattern, name.removeprefix(prefix)):
                found = match.groupdict()
                module = _oldest(found["oldest"]) if found.get("oldest") else found["module"]
                return Key(model, module.replace(".processor.", "."), _PARTS[found["part"]], "table" in found)
        return None
    return None


def _oldest(module: str) -> str:
    """diffusers before 0.18 called attention's adapters alike in all models."""
    parent, _, name = module.rpartition(".")
    if parent.endswith("self_attn"):
        return f"{parent}.{name.removeprefix('to_')}_proj"
    return f"{parent}.{'to_out.0' if name == 'to_out' else name}"


def spell(form: Format, model: str, module: str, part: str, table: bool = False) -> str:
    """The name of an array in the format's present spelling; undoes `parse` for these."""
    if form == "kohya":
        end = {"a": "lora_down.weight", "b": "lora_up.weight", "alpha": "alpha", "magnitude": "dora_scale"}[part]
        return f"{KOHYA[model]}{module.replace('.', '_')}.{end}"
    end = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}[part]
    if table and part != "magnitude":
        end = end.replace("lora_", "lora_embedding_")
    elif part != "magnitude" or (form, model) == ("diffusers", "text"):
        end += ".weight"  # of a text encoder's magnitudes, too: transformers, by which diffusers loads them, wants it
    return f"{PEFT if form == 'peft' else FOLDERS[model] + '.'}{module}.{end}"


def older(name: str) -> str:
    """diffusers' spelling of a text encoder's factors before it had peft's."""
    return name.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")


def partner(name: str) -> str:
    """The name of `a` beside that of `b`, and the other way round."""
    for a, b in _PARTNERS:
        for here, there in ((a, b), (b, a)):
            if here in name:
                return there.join(name.rsplit(here, 1))
    return name


def refuse_others(names: Iterable[str]) -> None:
    """ConversionError, which says what it is, for a file that has a name of something else than a LoRA."""
    for name in names:
        for pattern, what in OTHERS:
            if re.fullmatch(pattern, str(name)):
                raise refuse(f"it is {what}, which jdiff does not read as a LoRA: it holds {str(name)[:120]}")
