"""peft's LoraConfig, in adapter_config.json or diffusers' `lora_adapter_metadata`: read strictly, and made."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdiff.convert import clip
from jdiff.convert.rows import refuse

Config = Mapping[str, Any]
PASSED = ("base_model_name_or_path", "revision", "task_type")
"""Settings that say something of the base, taken over from one file to another."""
_USED = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
_CHECKED = ("bias", "init_lora_weights")
_IDLE = (
    *PASSED,
    # what is adapted is told by the arrays; the rest is of training, or of how peft and its initialisations work
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode"),
    *("auto_mapping", "peft_version", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config"),
)
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take their adapter away from the base: it goes with that base, not with the model."""
_REASONS = {
    "modules_to_save": "whole modules beside the adapters",
    "fan_in_fan_out": "kernels that lie the other way round, as in no model of jdiff's",
    "lora_bias": "biases of the adapters",
    "target_parameters": "adapters of bare parameters",
    "trainable_token_indices": "trained rows of the table beside the adapters",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "adapters that begin in the middle of a text",
}
_MOST_PATTERN = 300


@dataclasses.dataclass(frozen=True)
class Settings:
    """Ranks and scales of a model's adapters. ranks, alphas: regex of a module's name, or of its end -> what differs there."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool

    def of(self, module: str) -> tuple[int, float]:
        """(rank, scale) of a module: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
        rank = _lookup(self.ranks, module, self.rank)
        alpha = _lookup(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _lookup(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """As peft.utils.other.get_pattern_key: the first pattern that matches the name or its end from some dot on."""
    # patterns may be of a transformers whose names had no `text_model.`
    for name in dict.fromkeys((module, module.removeprefix(clip.PREFIX))):
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
    return default


def read(config: Config) -> Settings:
    """A LoraConfig's settings. ConversionError names one that changes what the adapters do and that jdiff does not have."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise refuse(f"its settings are of peft_type={kind!r}, and jdiff reads LORA")
    for key, value in config.items():
        if key in (*_USED, *_CHECKED, *_IDLE) or not value:
            continue
        raise refuse(f"its settings have {key}={str(value)[:80]}: {_REASONS.get(key, 'jdiff does not know it')}")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key, False), bool):
            raise refuse(f"its settings have {key}={str(config[key])[:80]}, which is neither true nor false")
    if config.get("bias", "none") != "none":
        raise refuse(
            f"its settings have bias={config['bias']!r}: trained biases beside the adapters, which jdiff has not"
        )
    how = config.get("init_lora_weights", True)
    if isinstance(how, str) and how.lower().startswith(_OTHER_BASE):
        raise refuse(
            f"its settings have init_lora_weights={how!r}: it goes with a base of its own, not with the model; save it with "
            "peft's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for key, value, whole in (("r", rank, True), ("lora_alpha", alpha, False)):
        _number(key, value, whole)
    for key, patterns, whole in (("rank_pattern", ranks, True), ("alpha_pattern", alphas, False)):
        if not isinstance(patterns, dict):
            raise refuse(f"its settings have {key}={str(patterns)[:80]}, which is no object")
        for pattern, value in patterns.items():
            _number(f"{key}[{pattern!r}]", value, whole)
            _harmless(pattern)
    return Settings(rank, alpha, ranks, alphas, bool(config.get("use_rslora")), bool(config.get("use_dora")))


def _number(key: str, value: Any, whole: bool) -> None:
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value == 0 or (whole and value < 0):
        what = "a whole number above 0" if whole else "a finite number other than 0"
        raise refuse(f"its settings have {key}={str(value)[:80]}, which is not {what}")


def _harmless(pattern: str) -> None:
    """ConversionError for a regex that is none, or that could take for ever: it comes from a file."""
    repeats = len(re.findall(r"(?<!\\)[*+{?]", pattern))
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise refuse(f"its settings have the pattern {pattern[:80]!r}, which is no regex: {error}") from error
    if len(pattern) > _MOST_PATTERN or repeats > 3 or re.search(r"\)[*+{?]", pattern):
        raise refuse(f"its settings have the pattern {pattern[:80]!r}, which is too intricate to be a module's name")


def make(adapters: Mapping[str, tuple[int, float]], dora: bool, passed: Config) -> dict[str, Any]:
    """The LoraConfig of adapters: module's name -> (rank, scale). Names are written without `text_model.`, which fits the
    models of every transformers. passed: settings of `PASSED`."""
    named = {name.removeprefix(clip.PREFIX): pair for name, pair in adapters.items()}
    ranks = {name: rank for name, (rank, _) in named.items()}
    alphas = {name: alpha(scale, rank) for name, (rank, scale) in named.items()}
    rank, usual = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        **{key: passed.get(key) for key in PASSED},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != usual},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "target_modules": sorted(named),
        "use_dora": dora,
        "use_rslora": False,
    }


def alpha(scale: float, rank: int) -> int | float:
    """The shortest number that gives the scale again, in float32, when it is divided by the rank."""
    exact = float(scale) * rank
    for digits in range(1, 18):
        short = float(f"{exact:.{digits}g}")
        if np.float32(short / rank) == np.float32(scale):
            return int(short) if short.is_integer() and abs(short) < 2**53 else short
    return exact
