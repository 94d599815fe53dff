"""A scheduler bound to a number of steps: tables, the pure step that reads them, and the one loop that runs it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.diffusion.schedule import ModelFn, sample_noise, upcast
from jdiff.diffusion.schedulers import alphas, multistep, sigmas
from jdiff.diffusion.schedulers.method import Method, call
from jdiff.diffusion.schedulers.settings import Settings, noise_schedule

Carry = tuple[jax.Array, ...]

METHODS = {
    "pndm": alphas.pndm,
    "ddim": alphas.ddim,
    "ddpm": alphas.ddpm,
    "euler": sigmas.euler,
    "euler_ancestral": sigmas.euler_ancestral,
    "heun": sigmas.heun,
    "dpmpp_2m": multistep.dpmpp_2m,
    "dpmpp_2m_sde": multistep.dpmpp_2m_sde,
    "unipc": multistep.unipc,
    "lcm": alphas.lcm,
}


@dataclass(frozen=True)
class Plan:
    """The model calls 0..`calls` - 1 that a scheduler makes on so many steps; hashable, so static for `jax.jit`.

    With `strength` below 1 (image-to-image) the leading calls are left out, and call 0 is the first one that is made:
    of N steps min(int(N * strength), N) remain. Begin there with `add_noise(x_0, noise, 0)`, else with
    `init_noise_sigma` times standard normal noise. Made by `Scheduler.plan`.

    The index i of a call may be traced. x is (B, H, W, C), in at least float32 as is all the work.
    """

    kind: str
    settings: Settings
    steps: int
    strength: float = 1.0

    def __post_init__(self):
        total = self.settings.num_train_timesteps
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or not 1 <= self.steps <= total:
            raise ValueError(f"steps={self.steps!r} must be a whole number in 1..{total}")
        if not 0.0 < self.strength <= 1.0:
            raise ValueError(f"strength={self.strength} must be above 0 and at most 1")
        if int(self.steps * self.strength) < 1:
            raise ValueError(
                f"strength={self.strength} leaves none of steps={self.steps}; use a strength of at least 1/{self.steps}"
            )
        _ = self._rows  # so that settings and steps that do not go together are found here

    @functools.cached_property
    def _method(self) -> Method:
        return METHODS[self.kind](self.settings, noise_schedule(self.settings).alphas_cumprod, self.steps)

    @property
    def start(self) -> int:
        """How many of all the calls are left out by `strength`."""
        return self._method.order * (self.steps - int(self.steps * self.strength))

    @property
    def timesteps(self) -> np.ndarray:
        """(M,) what the model is told at each call: int32, or float32 for Euler's kind."""
        return self._method.timesteps[self.start :]

    @property
    def calls(self) -> int:
        """M, the calls of the model: N + 1 for pndm, 2 N - 1 for heun, else N; fewer with `strength`."""
        return len(self.timesteps)

    @property
    def init_noise_sigma(self) -> float:
        """Factor of the noise that a run with `strength` 1 begins with."""
        return self._method.init_noise_sigma

    @property
    def stochastic(self) -> bool:
        """Whether the steps draw noise."""
        return bool(np.any(self._rows[:, 1:, 2]))

    @functools.cached_property
    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        """Signal and noise in x at each call, (M + 1,) each; the last is clean data."""
        method, calls = self._method, slice(self.start, None)
        signal, sigma = method.signal[calls], method.sigma[calls]
        if method.exploding:
            signal, sigma = np.ones_like(sigma), sigma / signal
        return np.append(signal, 1.0), np.append(sigma, 0.0)

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        """(M, 2 + K, 4 + K): rows x_0 before clipping, next x, next memory; columns as `method.call` says."""
        method, rows = self._method, []
        for i in range(self.start, len(method.timesteps)):
            at_hand, x_0 = call(method, self.settings, i, self.start)
            rows.append(np.stack([x_0, *method.step(at_hand)]))
        return np.stack(rows)

    def add_noise(self, x_0: jax.Array, noise: jax.Array, i: int | jax.Array) -> jax.Array:
        """Clean x_0 brought to the noise level of call i; i = `calls` gives it back clean."""
        x_0, noise = upcast(x_0), upcast(noise)
        signal, sigma = (jnp.asarray(level, x_0.dtype)[i] for level in self._levels)
        return signal * x_0 + sigma * noise

    def scale_input(self, x: jax.Array, i: int | jax.Array) -> jax.Array:
        """What the model is shown of x at call i: x itself, or for Euler's kind x at unit variance."""
        if not self._method.exploding:
            return x
        return x * jnp.asarray(self._method.signal[self.start :], x.dtype)[i]

    def init(self, x: jax.Array) -> Carry:
        """The memory before call 0, for `step` to fill: a tuple of arrays like x."""
        return tuple(jnp.zeros_like(upcast(x)) for _ in range(self._method.memory))

    def step(
        self, carry: Carry, x: jax.Array, model_output: jax.Array, i: int | jax.Array, noise: jax.Array | None = None
    ) -> tuple[Carry, jax.Array]:
        """(carry, x) after call i, which gave `model_output`; `noise`, like x, is read if `stochastic`.

        Raises ValueError for a model output that is not like x, and for missing noise.
        """
        x, model_output = upcast(x), upcast(model_output)
        if model_output.shape != x.shape:
            raise ValueError(f"the model must give {x.shape} (no variance half), not {model_output.shape}")
        if self.stochastic and noise is None:
            raise ValueError(f"{self.kind} draws noise at every step: give noise of shape {x.shape}")
        used = np.any(self._rows != 0.0, axis=0)
        rows = jnp.asarray(self._rows, x.dtype)[i]

        def total(row: int) -> jax.Array:
            terms = zip(rows[row], used[row], at_hand, strict=True)
            return sum((scale * array for scale, is_used, array in terms if is_used), start=jnp.zeros_like(x))

        at_hand = [x, model_output, noise, None, *carry]
        if used[1:, 3].any():
            limit = self.settings.clip_sample_range
            at_hand[3] = jnp.clip(total(0), -limit, limit)
        x, *memory = (total(row).astype(x.dtype) for row in range(1, len(used)))
        return tuple(memory), x


def run(
    plan: Plan,
    denoise: ModelFn,
    x: jax.Array,
    keys_B: jax.Array | None = None,
    *,
    first: int | jax.Array = 0,
    last: int | jax.Array | None = None,
    carry: Carry | None = None,
    after_step: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    noise_fn: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Carry]:
    """Makes calls `first`..`last` - 1 of a plan in one traced loop and returns (x, carry).

    Args:
      plan: static under `jax.jit`.
      denoise: (x_BHWC, t_B) to the prediction, already guided, of x's shape.
      x: where call `first` begins: noise times `plan.init_noise_sigma`, noised data, or what an earlier part gave.
      keys_B: one typed PRNG key a sample. Noise depends on a sample's own key and on i, hence its picture does not
        depend on the batch. Needed where `plan.stochastic` and no `noise_fn` is given.
      first, last: numbers, or traced so that a run in parts compiles once; all of the plan unless given.
      carry: what the part before gave; needed for it unless `first` is 0.
      after_step: (x, i) to x, after each step, with the index of the call that comes next (inpainting blends here).
      noise_fn: i to the step's noise (B, H, W, C), in place of that of `keys_B`.

    Raises:
      ValueError: no source of noise, an output of another shape, or `first` without the carry.
    """
    if plan.stochastic and keys_B is None and noise_fn is None:
        raise ValueError(f"{plan.kind} draws noise at every step: give keys_B, one key a sample")
    if carry is None and not (isinstance(first, int) and first == 0):
        raise ValueError("a run that begins at a later call needs the carry of the part before it")
    x = upcast(x)
    timesteps = jnp.asarray(plan.timesteps)

    def noise_at(i):
        if noise_fn is not None:
            return noise_fn(i)
        return sample_noise(jax.vmap(lambda key: jax.random.fold_in(key, i))(keys_B), x.shape[1:], x.dtype)

    def body(i, state):
        carry, x = state
        output = denoise(plan.scale_input(x, i), jnp.full(x.shape[:1], timesteps[i]))
        carry, x = plan.step(carry, x, output, i, noise_at(i) if plan.stochastic else None)
        return carry, x if after_step is None else after_step(x, i + 1).astype(x.dtype)

    begin = (plan.init(x) if carry is None else carry), x
    kept, x = jax.lax.fori_loop(first, plan.calls if last is None else last, body, begin)
    return x, kept
