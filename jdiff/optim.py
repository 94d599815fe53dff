"""The optimizer, its learning-rate schedule, and the moving average of the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdiff import tree

DECAYED = ((r"(.*/)?(kernel|a|b)", True), (r".*", False))
"""Weight decay's rules: kernels (and LoRA factors) decay; biases, norms, embedding tables and positions do not."""


def make_schedule(name: str, lr: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up to `lr`, then constant, or a cosine or line down to 0 at total_steps."""
    rest = max(total_steps - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest),
        "linear": lambda: optax.linear_schedule(lr, 0.0, rest),
    }
    if name not in after:
        raise ValueError(f"optim.schedule={name!r} is unknown{tree.nearest(name, after)}; use one of {list(after)}")
    if not warmup_steps:
        return after[name]()
    warm = optax.linear_schedule(0.0, lr, warmup_steps)
    # the first step would otherwise have rate 0 and change nothing
    return optax.join_schedules([lambda step: warm(step + 1), after[name]()], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    decay_rules: tree.Rules[bool] = DECAYED,
    plus_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) whose decay reaches only the leaves that `decay_rules` choose.

    plus_ratio: what the learning rate of LoRA's b is multiplied by (LoRA+, arXiv:2402.12354).
    """
    mask = lambda params: tree.apply_rules(decay_rules, params)  # noqa: E731
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    if plus_ratio == 1.0:
        return adamw

    def quicker(updates: Any, params: Any) -> Any:
        return tree.map_with_path(lambda path, x: x * tree.match(rates, path), updates)

    rates = ((r"lora/.*/b", plus_ratio), (r".*", 1.0))
    return optax.chain(adamw, optax.stateless(quicker))


def clip_scale(norm: jax.Array, clip_norm: float | None) -> jax.Array | float:
    """The factor that brings gradients of global norm `norm` down to `clip_norm`; 1 when there is no limit."""
    return 1.0 if clip_norm is None else jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))


class Ema(NamedTuple):
    """How parameters are averaged: `decay` at most; with `warmup`, 1 - (1 + n)^-2/3 while that is lower.

    The warm-up is the form of diffusers' `EMAModel` (inv_gamma 1, power 2/3), so that short runs average too.
    """

    decay: float = 0.9999
    warmup: bool = False

    def rate(self, step: jax.Array) -> jax.Array:
        """The decay after update number `step` (the first update has step 0)."""
        decay = jnp.float32(self.decay)
        return jnp.minimum(decay, 1.0 - (1.0 + step.astype(jnp.float32)) ** (-2 / 3)) if self.warmup else decay

    def update(self, average: Any, params: Any, step: jax.Array) -> Any:
        """One step of the average: average + (1 - decay) (params - average)."""
        rest = 1.0 - self.rate(step)
        return jax.tree.map(lambda ema, new: ema + rest.astype(ema.dtype) * (new - ema), average, params)
