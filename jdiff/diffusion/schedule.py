"""The forward process: noise tables in float64, respacing, conversions between predictions, random draws.

Shapes: B batch, H height, W width, C channels. `t_B` holds integer positions in the schedule at hand; the
timestep that a model is given is `schedule.timesteps[t]` (the same number unless the schedule is respaced).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

SCHEDULES = ("linear", "scaled_linear", "cosine")
PREDICTION_TYPES = ("eps", "v", "x0")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
SPACINGS = ("sections", "leading", "trailing")
TIME_KINDS = ("uniform", "logit_normal")
TIMESTEP_BIASES = ("later", "earlier", "range")

ModelFn = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Noise tables of a discrete Gaussian diffusion, float64, shape (T,); index 0 is the cleanest step.

    Two schedules are equal when their contents are, so one can be a static argument of `jax.jit`.

    Attributes:
      betas: variance added by each step.
      alphas_cumprod: signal power left after each step (abar of the papers).
      timesteps: the original timestep of each position, ascending, int32; what the model is given.
      final_alpha_cumprod: the level that DDIM's last step lands on: 1 for clean data; Stable Diffusion v1's
        scheduler (`set_alpha_to_one: false`) lands on the original alphas_cumprod[0].
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    timesteps: np.ndarray
    final_alpha_cumprod: float = 1.0

    def __post_init__(self):
        for table in (self.betas, self.alphas_cumprod, self.timesteps):
            table.setflags(write=False)

    def __len__(self) -> int:
        return len(self.betas)

    @functools.cached_property
    def _content(self):
        tables = (self.betas, self.alphas_cumprod, self.timesteps)
        return *(table.tobytes() for table in tables), self.final_alpha_cumprod

    def __eq__(self, other):
        return isinstance(other, Schedule) and self._content == other._content

    def __hash__(self):
        return hash(self._content)

    @functools.cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @functools.cached_property
    def snr(self) -> np.ndarray:
        """Signal-to-noise ratio abar / (1 - abar)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0), DDPM (2006.11239) eq. 7; zero at position 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Log of `posterior_variance`, whose zero at position 0 is replaced by position 1's value."""
        first = self.posterior_variance[1] if len(self) > 1 else self.betas[0]
        return np.log(np.append(first, self.posterior_variance[1:]))

    @functools.cached_property
    def posterior_mean_coefs(self) -> tuple[np.ndarray, np.ndarray]:
        """Factors of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7."""
        of_x_0 = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        of_x_t = (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)
        return of_x_0, of_x_t


def make_schedule(
    name: str,
    num_timesteps: int = 1000,
    beta_start: float | None = None,
    beta_end: float | None = None,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Builds a named noise schedule.

    - `linear`: betas from 1e-4 to 0.02, both times 1000 / num_timesteps (DDPM, 2006.11239, section 4;
      guided-diffusion and DiT).
    - `scaled_linear`: square roots of betas evenly spaced, 0.00085 to 0.012 (Stable Diffusion; CompVis calls
      it "linear").
    - `cosine`: abar(u) = cos((u + 0.008) / 1.008 * pi / 2)^2, betas at most 0.999 (2102.09672, eq. 17).

    With `zero_terminal_snr` the tables are shifted and rescaled so that the last abar is 0 (2305.08891,
    algorithm 1); eps predictions are then refused, since they do not determine x_0 there.

    Raises:
      ValueError: unknown name, betas outside (0, 1], or beta limits given to `cosine`.
    """
    check_choice("schedule", name, SCHEDULES)
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, not {num_timesteps}")
    if name == "cosine":
        if beta_start is not None or beta_end is not None:
            raise ValueError("schedule 'cosine' takes no beta_start or beta_end")
        u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        abar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1.0 - abar[1:] / abar[:-1], 0.999)
    else:
        scale, power = (1000.0 / num_timesteps, 1) if name == "linear" else (1.0, 2)
        low, high = (scale * 1e-4, scale * 0.02) if name == "linear" else (0.00085, 0.012)
        low = low if beta_start is None else beta_start
        high = high if beta_end is None else beta_end
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"betas must lie in (0, 1] and ascend, not from {low:g} to {high:g}")
        betas = np.linspace(low ** (1 / power), high ** (1 / power), num_timesteps, dtype=np.float64) ** power
    alphas_cumprod = np.cumprod(1.0 - betas)
    if zero_terminal_snr:
        if num_timesteps < 2:
            raise ValueError("zero_terminal_snr needs at least 2 timesteps")
        root = np.sqrt(alphas_cumprod)
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas_cumprod = root**2
        betas = _betas_of(alphas_cumprod)
    return Schedule(betas, alphas_cumprod, np.arange(num_timesteps, dtype=np.int32))


def keep_timesteps(schedule: Schedule, positions: Iterable[int], final_alpha_cumprod: float = 1.0) -> Schedule:
    """The schedule that visits only the given positions of `schedule`; betas follow from the kept abars.

    Raises ValueError where there are none, or one lies outside the schedule.
    """
    keep = sorted(set(positions))
    if not keep or keep[0] < 0 or keep[-1] >= len(schedule):
        found = f"{keep[0]}..{keep[-1]}" if keep else "none"
        raise ValueError(f"timesteps to keep must be some of 0..{len(schedule) - 1}, not {found}")
    alphas_cumprod = schedule.alphas_cumprod[keep]
    return Schedule(_betas_of(alphas_cumprod), alphas_cumprod, schedule.timesteps[keep], final_alpha_cumprod)


def respace(
    schedule: Schedule,
    steps: int | str | Sequence[int],
    spacing: str = "sections",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
) -> Schedule:
    """A shorter schedule for sampling; the model still gets the original timesteps.

    `spacing="sections"` is guided-diffusion's and DiT's `space_timesteps`: an int or "250" spreads that many
    steps from the first to the last timestep, "10,15,20" or [10, 15, 20] does so in each of three equal
    sections, "ddim50" takes an integer stride from 0 (DDIM, 2010.02502).
    `"leading"` (k * (T // N) + steps_offset) and `"trailing"` (ends at T - 1; for zero terminal SNR) are the
    rows of 2305.08891, table 2, as diffusers counts them. `set_alpha_to_one=False` as in `Schedule`.

    Raises:
      ValueError: unknown spacing, or steps that do not fit.
    """
    check_choice("spacing", spacing, SPACINGS)
    total = len(schedule)
    if spacing == "sections":
        if steps_offset:
            raise ValueError("steps_offset belongs to spacing 'leading'")
        keep = _space_sections(total, steps)
    else:
        if not isinstance(steps, int) or not 1 <= steps <= total:
            raise ValueError(f"spacing '{spacing}' needs an int number of steps in 1..{total}, not {steps!r}")
        if spacing == "leading":
            keep = [i * (total // steps) + steps_offset for i in range(steps)]
        elif steps_offset:
            raise ValueError("steps_offset belongs to spacing 'leading'")
        else:
            keep = [round(total - i * (total / steps)) - 1 for i in range(steps)]
    return keep_timesteps(schedule, keep, 1.0 if set_alpha_to_one else float(schedule.alphas_cumprod[0]))


def add_noise(schedule: Schedule, x_0: jax.Array, noise: jax.Array, t_B: jax.Array) -> jax.Array:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, in at least float32 (DDPM eq. 4). Shapes (B, ...)."""
    x_0, noise = upcast(x_0), upcast(noise)
    signal, sigma = signal_and_sigma(schedule, t_B, x_0)
    return signal * x_0 + sigma * noise


def prediction_target(
    schedule: Schedule, x_0: jax.Array, noise: jax.Array, t_B: jax.Array, prediction_type: str
) -> jax.Array:
    """What a model of `prediction_type` should give: noise, v = sqrt(abar) noise - sqrt(1-abar) x_0, or x_0.

    v is of 2202.00512, appendix D. Raises ValueError for an unknown type.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    x_0, noise = upcast(x_0), upcast(noise)
    if prediction_type == "eps":
        return noise
    if prediction_type == "x0":
        return x_0
    signal, sigma = signal_and_sigma(schedule, t_B, x_0)
    return signal * noise - sigma * x_0


def split_prediction(
    schedule: Schedule, prediction: jax.Array, x_t: jax.Array, t_B: jax.Array, prediction_type: str
) -> tuple[jax.Array, jax.Array]:
    """(x_0, eps) that a prediction of `prediction_type` implies at x_t; the inverse of `prediction_target`.

    Raises ValueError for an unknown type, and for eps where the schedule reaches zero SNR.
    """
    check_prediction(schedule, prediction_type)
    prediction, x_t = upcast(prediction), upcast(x_t)
    signal, sigma = signal_and_sigma(schedule, t_B, x_t)
    if prediction_type == "eps":
        return (x_t - sigma * prediction) / signal, prediction
    if prediction_type == "x0":
        return prediction, (x_t - signal * prediction) / sigma
    return signal * x_t - sigma * prediction, signal * prediction + sigma * x_t


@dataclasses.dataclass(frozen=True)
class TimestepBias:
    """Which timesteps are drawn more often, or less, in training (diffusers' `--timestep_bias_strategy`).

    strategy: "later" or "earlier", the last or first `portion` of all timesteps; "range", those from `begin` to before `end`.
    multiplier: how often one of them is drawn, against one of the others.
    """

    strategy: str
    multiplier: float
    begin: int = 0
    end: int = 1000
    portion: float = 0.25

    def probabilities(self, num_timesteps: int) -> np.ndarray:
        """Float64 (num_timesteps,). ValueError for an unknown strategy, or settings that choose no timestep."""
        check_choice("timestep bias", self.strategy, TIMESTEP_BIASES)
        if not self.multiplier > 0:
            raise ValueError(f"the timestep bias has a multiplier of {self.multiplier}; it must be above 0")
        weights = np.ones(num_timesteps)
        if self.strategy == "range":
            if not 0 <= self.begin < self.end <= num_timesteps:
                raise ValueError(
                    f"the timestep bias has the range {self.begin} to {self.end}; it must lie in 0..{num_timesteps}"
                )
            weights[self.begin : self.end] = self.multiplier
        else:
            chosen = int(self.portion * num_timesteps)
            if not 0 < chosen <= num_timesteps:
                raise ValueError(
                    f"the timestep bias has portion={self.portion}, {chosen} of {num_timesteps} timesteps; "
                    "it must lie above 0 and be at most 1"
                )
            start = 0 if self.strategy == "earlier" else num_timesteps - chosen
            weights[start : start + chosen] = self.multiplier
        return weights / weights.sum()


def sample_timesteps(keys_B: jax.Array, num_timesteps: int, bias: TimestepBias | None = None) -> jax.Array:
    """Integers in [0, num_timesteps), int32 (B,), uniform but for `bias`; each from its sample's own typed key."""
    if bias is None:
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_timesteps, jnp.int32))(keys_B)
    below = np.cumsum(bias.probabilities(num_timesteps))[:-1]  # the last is 1, above every draw
    u_B = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys_B)
    return jnp.searchsorted(jnp.asarray(below, jnp.float32), u_B, side="right").astype(jnp.int32)


def offset_noise(keys_B: jax.Array, noise_BHWC: jax.Array, offset: float) -> jax.Array:
    """`noise` plus `offset` times one standard normal number for each sample and channel, from the sample's own key.

    So that a model learns to change a picture's mean (crosslabs.org, "Diffusion with Offset Noise").
    """
    B, C = noise_BHWC.shape[0], noise_BHWC.shape[-1]
    ones = (1,) * (noise_BHWC.ndim - 2)
    return noise_BHWC + offset * sample_noise(keys_B, (C,), noise_BHWC.dtype).reshape(B, *ones, C)


def sample_times(keys_B: jax.Array, kind: str = "uniform") -> jax.Array:
    """Times in [0, 1) for flow matching, float32 (B,); each from its sample's own typed key.

    `uniform` as in SiT (2401.08740), or `logit_normal`: sigmoid of a standard normal (2403.03206, section
    3.1). Raises ValueError for another kind.
    """
    check_choice("time distribution", kind, TIME_KINDS)
    if kind == "uniform":
        return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys_B)
    return jax.nn.sigmoid(jax.vmap(lambda key: jax.random.normal(key, (), jnp.float32))(keys_B))


def sample_noise(keys_B: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Standard normal noise of shape (B, *shape), each sample's from its own typed key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys_B)


def upcast(x: jax.Array) -> jax.Array:
    """x in at least float32; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def take(table: np.ndarray, t_B: jax.Array, like: jax.Array) -> jax.Array:
    """table[t_B] in `like`'s dtype, shaped to broadcast against it."""
    return jnp.asarray(table, like.dtype)[t_B].reshape(t_B.shape + (1,) * (like.ndim - t_B.ndim))


def signal_and_sigma(schedule: Schedule, t_B: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sqrt(abar_t), sqrt(1 - abar_t)), shaped to broadcast against `like`."""
    abar = schedule.alphas_cumprod
    return take(np.sqrt(abar), t_B, like), take(np.sqrt(1.0 - abar), t_B, like)


def check_choice(what: str, name: str, choices: Sequence[str]) -> None:
    """Raises a ValueError that lists the choices unless `name` is one of them."""
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(choices)}")


def check_prediction(schedule: Schedule, prediction_type: str) -> None:
    """Raises ValueError for an unknown prediction type, or eps on a schedule that reaches zero SNR."""
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "eps" and schedule.alphas_cumprod[-1] == 0.0:
        raise ValueError("prediction_type 'eps' is undefined at zero terminal SNR; use 'v' or 'x0'")


def _betas_of(alphas_cumprod: np.ndarray) -> np.ndarray:
    return 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def _space_sections(total: int, steps: int | str | Sequence[int]) -> list[int]:
    if isinstance(steps, str) and steps.startswith("ddim"):
        count = _to_int(steps[len("ddim") :], steps)
        for stride in range(1, total + 1):
            if len(range(0, total, stride)) == count:
                return list(range(0, total, stride))
        raise ValueError(f"no integer stride gives exactly {count} of {total} timesteps")
    if isinstance(steps, str):
        counts = [_to_int(part, steps) for part in steps.split(",")]
    else:
        counts = [steps] if isinstance(steps, int) else list(steps)
    if not counts or min(counts) < 1:
        raise ValueError(f"every section needs at least one step, not {steps!r}")
    keep, start = [], 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if count > size:
            raise ValueError(f"cannot take {count} steps from a section of {size} timesteps")
        # Summed, not multiplied: a stride that lands on .5 must round as the published samplers do.
        position, stride = 0.0, (size - 1) / (count - 1) if count > 1 else 1.0
        for _ in range(count):
            keep.append(start + round(position))
            position += stride
        start += size
    return keep


def _to_int(text: str, spec: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"cannot read the respacing {spec!r}; write 250, '250', '10,15,20' or 'ddim50'")
    return int(text)
