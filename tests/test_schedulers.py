"""Schedulers against diffusers': the same timesteps and, with shared noise and a toy model, the same result."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import diffusion
from jdiff.diffusion import schedulers
from jdiff.diffusion.schedulers import SCHEDULERS, from_config, make_scheduler, run

diffusers = pytest.importorskip("diffusers")
import torch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own

SHAPE = (2, 3, 3, 2)
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(2, 2)).astype(np.float32)
X, NOISE = RNG.normal(size=(2, *SHAPE)).astype(np.float32)
STEP_NOISE = RNG.normal(size=(120, *SHAPE)).astype(np.float32)

# scheduler/scheduler_config.json of runwayml/stable-diffusion-v1-5 and of stabilityai/stable-diffusion-2-1
SD1 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21 = SD1 | {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"}
ZERO_SNR = SD1 | {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}
KARRAS = SD1 | {"use_karras_sigmas": True}

CLASSES = {
    "pndm": ("PNDMScheduler", "pndm"),
    "ddim": ("DDIMScheduler", "ddim"),
    "ddpm": ("DDPMScheduler", "ddpm"),
    "euler": ("EulerDiscreteScheduler", "euler_discrete"),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", "euler_ancestral_discrete"),
    "heun": ("HeunDiscreteScheduler", "heun_discrete"),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", "dpmsolver_multistep"),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", "dpmsolver_multistep"),
    "unipc": ("UniPCMultistepScheduler", "unipc_multistep"),
    "lcm": ("LCMScheduler", "lcm"),
}
KARRAS_KINDS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
NO_ZERO_SNR = ("pndm", "heun")


def steps_of(kind, many=False):
    """20 and 50 steps, of LCM 4 and 8."""
    return (8 if many else 4) if kind == "lcm" else (50 if many else 20)


def toy_model(abar, prediction_type):
    """A denoiser (x, t) of bounded x_0 for NumPy and JAX; else every error would be blown up by 1 / sqrt(abar)."""
    positions = np.arange(len(abar), dtype=np.float32)
    root, sigma = (np.asarray(a, np.float32) for a in (abar**0.5, (1 - abar) ** 0.5))

    def model(x, t):
        np_ = jnp if isinstance(x, jax.Array) else np
        a, s = (np_.interp(t, positions, table).reshape(-1, 1, 1, 1).astype(x.dtype) for table in (root, sigma))
        v = np_.tanh(x @ WEIGHT.astype(x.dtype) + np_.sin(0.01 * t).astype(x.dtype).reshape(-1, 1, 1, 1))
        return {"epsilon": s * x + a * v, "v_prediction": v, "sample": a * x - s * v}[prediction_type]

    return model


def theirs(kind, config):
    """diffusers' scheduler of a kind."""
    more = {"dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m": {"algorithm_type": "dpmsolver++"}}
    return getattr(diffusers, CLASSES[kind][0]).from_config(dict(config), **more.get(kind, {}))


def drive(kind, config, steps, model, monkeypatch, strength=None, mask=None):
    """The loop of diffusers' text-to-image, image-to-image or inpainting pipeline: (timesteps, x)."""
    scheduler = theirs(kind, config)
    scheduler.set_timesteps(steps)
    timesteps, drawn = scheduler.timesteps, {}
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{CLASSES[kind][1]}")
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(drawn["noise"]))
    start = 0 if strength is None else max(steps - min(int(steps * strength), steps), 0) * scheduler.order
    timesteps = timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    x = torch.tensor(NOISE) * scheduler.init_noise_sigma
    if strength is not None:
        x = scheduler.add_noise(torch.tensor(X), torch.tensor(NOISE), timesteps[:1].repeat(len(X)))
    for i, t in enumerate(timesteps):
        drawn["noise"] = STEP_NOISE[i]
        shown = scheduler.scale_model_input(x, t).numpy()
        out = torch.tensor(model(shown, np.full(len(shown), t.item())))
        x = scheduler.step(out, t, x, return_dict=False)[0]
        if mask is not None:
            kept = torch.tensor(X)
            if i < len(timesteps) - 1:
                kept = scheduler.add_noise(kept, torch.tensor(NOISE), timesteps[i + 1].reshape(1))
            x = torch.tensor(1 - mask) * kept + torch.tensor(mask) * x
    return timesteps.numpy(), x.numpy()


def ours(kind, config, steps, model, strength=None, mask=None):
    """The same by jdiff: (timesteps, x)."""
    plan = make_scheduler(kind, config).plan(steps, 1.0 if strength is None else strength)
    x = NOISE * np.float32(plan.init_noise_sigma) if strength is None else plan.add_noise(X, NOISE, 0)

    def blend(x, i):
        return (1 - mask) * plan.add_noise(X, NOISE, i) + mask * x

    x, _ = jax.jit(
        lambda x: run(
            plan,
            model,
            x,
            noise_fn=lambda i: jnp.asarray(STEP_NOISE)[i],
            after_step=None if mask is None else blend,
        )
    )(jnp.asarray(x))
    return plan.timesteps, np.asarray(x)


def check(kind, config, steps, monkeypatch, **how):
    """Both loops give the same timesteps and x, to 1e-4 of x's scale."""
    scheduler = make_scheduler(kind, config)
    model = toy_model(scheduler.schedule.alphas_cumprod, scheduler.settings.prediction_type)
    expected_t, expected = drive(kind, config, steps, model, monkeypatch, **how)
    t, x = ours(kind, config, steps, model, **how)
    assert np.issubdtype(t.dtype, np.integer) == np.issubdtype(expected_t.dtype, np.integer)
    if np.issubdtype(t.dtype, np.integer):
        np.testing.assert_array_equal(t, expected_t)
    else:
        np.testing.assert_allclose(t, expected_t, atol=2e-3)
    assert np.isfinite(expected).all()
    assert np.abs(x - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_stable_diffusion_v1(kind, many, monkeypatch):
    check(kind, SD1, steps_of(kind, many), monkeypatch)


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_v_prediction_with_trailing_timesteps_and_zero_snr(kind, many, monkeypatch):
    config = ZERO_SNR | {"rescale_betas_zero_snr": kind not in NO_ZERO_SNR}
    check(kind, config, steps_of(kind, many), monkeypatch)


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("kind", KARRAS_KINDS)
def test_karras_sigmas(kind, many, monkeypatch):
    check(kind, KARRAS, steps_of(kind, many), monkeypatch)


OPTIONS = [
    ("pndm", {"timestep_spacing": "linspace", "set_alpha_to_one": True, "prediction_type": "v_prediction"}, 20),
    ("pndm", {"beta_schedule": "linear"}, 2),
    ("ddim", {"set_alpha_to_one": True, "timestep_spacing": "linspace"}, 7),
    ("ddim", {"clip_sample": True, "clip_sample_range": 0.5}, 20),
    ("ddim", {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"}, 30),
    ("ddim", {"num_train_timesteps": 100, "prediction_type": "sample", "steps_offset": 0}, 100),
    ("ddpm", {"clip_sample": True, "variance_type": "fixed_large", "steps_offset": 0}, 20),
    ("ddpm", {"variance_type": None, "prediction_type": "sample", "timestep_spacing": "linspace"}, 20),
    ("euler", {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min", "prediction_type": "sample"}, 20),
    ("euler", {"timestep_spacing": "trailing", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 20),
    ("euler_ancestral", {"timestep_spacing": "leading", "prediction_type": "v_prediction"}, 20),
    ("heun", {"clip_sample": True, "clip_sample_range": 0.5, "timestep_spacing": "leading"}, 7),
    ("heun", {"prediction_type": "sample"}, 7),
    ("dpmpp_2m", {}, 10),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}, 20),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}, 10),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_type": "bh2"}, 10),
    ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True, "use_karras_sigmas": True}, 20),
    ("dpmpp_2m", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}, 20),
    ("dpmpp_2m_sde", {"final_sigmas_type": "sigma_min", "prediction_type": "sample"}, 20),
    ("unipc", {"solver_order": 1, "prediction_type": "sample"}, 20),
    ("unipc", {"solver_order": 3, "timestep_spacing": "leading", "solver_type": "midpoint"}, 20),
    ("unipc", {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}, 10),
    ("unipc", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}, 10),
    ("unipc", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}, 20),
    ("lcm", {"original_inference_steps": 30, "timestep_scaling": 5.0, "clip_sample": True}, 7),
    ("lcm", {"prediction_type": "sample"}, 50),
    *((kind, {}, 1) for kind in ("pndm", "ddim", "euler", "heun", "unipc", "lcm")),
]


@pytest.mark.parametrize("kind, options, steps", OPTIONS, ids=lambda v: ",".join(v) if isinstance(v, dict) else str(v))
def test_options(kind, options, steps, monkeypatch):
    check(kind, SD1 | options, steps, monkeypatch)


@pytest.mark.parametrize("strength", [0.3, 0.75])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_image_to_image(kind, strength, monkeypatch):
    check(kind, SD1, 8 if kind == "lcm" else 20, monkeypatch, strength=strength)


@pytest.mark.parametrize("kind", ["pndm", "euler_ancestral", "heun", "unipc"])
def test_inpainting_blends_at_the_level_of_the_next_call(kind, monkeypatch):
    mask = (RNG.random((1, 3, 3, 1)) > 0.5).astype(np.float32)
    check(kind, SD1, 10, monkeypatch, strength=0.8, mask=mask)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_levels_begin_and_end_as_the_scheduler_says(kind):
    plan = make_scheduler(kind).plan(steps_of(kind))
    x = NOISE * np.float32(plan.init_noise_sigma)
    assert plan.calls == len(plan.timesteps) == {"pndm": 21, "heun": 39, "lcm": 4}.get(kind, 20)
    np.testing.assert_array_equal(plan.add_noise(X, NOISE, plan.calls), X)
    np.testing.assert_allclose(np.std(plan.scale_input(x, 0)), np.std(NOISE), rtol=5e-3)


@pytest.mark.parametrize("kind", ["euler", "unipc", "ddim"])
def test_what_is_predicted_makes_no_difference(kind):
    """One denoiser put as eps, v or x_0 draws one picture."""
    pictures = []
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        config = SD1 | {"prediction_type": prediction_type}
        abar = make_scheduler(kind, config).schedule.alphas_cumprod
        pictures.append(ours(kind, config, 10, toy_model(abar, prediction_type))[1])
    np.testing.assert_allclose(pictures[1], pictures[0], atol=1e-4)
    np.testing.assert_allclose(pictures[2], pictures[0], atol=1e-4)


@pytest.mark.parametrize("kind", ["pndm", "heun", "dpmpp_2m_sde", "unipc"])
def test_parts_equal_the_whole_and_compile_once(kind):
    scheduler = make_scheduler(kind)
    plan, keys = scheduler.plan(steps_of(kind)), jax.random.split(jax.random.key(0), len(X))
    model, traces = toy_model(scheduler.schedule.alphas_cumprod, "epsilon"), []

    @jax.jit
    def part(x, carry, first, last):
        traces.append(None)
        return run(plan, model, x, keys, first=first, last=last, carry=carry)

    begun = jnp.asarray(NOISE) * plan.init_noise_sigma
    whole, _ = jax.jit(lambda x: run(plan, model, x, keys))(begun)
    x, carry, cuts = begun, plan.init(begun), (0, 1, plan.calls // 2, plan.calls)
    for first, last in itertools.pairwise(cuts):
        x, carry = part(x, carry, first, last)
    np.testing.assert_allclose(x, whole, atol=1e-5 * float(jnp.abs(whole).max()))
    assert len(traces) == 1


@pytest.mark.parametrize("kind", ["euler_ancestral", "lcm"])
def test_a_picture_does_not_depend_on_its_batch(kind):
    scheduler = make_scheduler(kind)
    plan, keys = scheduler.plan(steps_of(kind)), jax.random.split(jax.random.key(0), len(X))
    model = toy_model(scheduler.schedule.alphas_cumprod, "epsilon")
    draw = jax.jit(lambda x, keys: run(plan, model, x, keys)[0])
    together, alone, other = draw(NOISE, keys), draw(NOISE[1:], keys[1:]), draw(NOISE[1:], keys[:1])
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5)
    assert np.abs(other - alone).max() > 0.01


def test_half_precision_input_is_worked_on_in_float32():
    plan = make_scheduler("dpmpp_2m").plan(4)
    x, carry = run(plan, lambda x, t: x.astype(jnp.bfloat16), jnp.asarray(NOISE, jnp.bfloat16))
    assert x.dtype == jnp.float32
    assert all(array.dtype == jnp.float32 for array in carry)


def test_plans_are_equal_and_hashable_by_their_contents():
    plan = make_scheduler("euler").plan(20)
    assert plan == from_config(SD1).replace_kind("euler").plan(20)
    assert hash(plan) == hash(make_scheduler("euler", SD1).plan(20))
    assert plan not in (
        make_scheduler("euler").plan(21),
        make_scheduler("heun").plan(20),
        make_scheduler("euler").plan(20, 0.5),
    )


def test_from_config_reads_the_published_files():
    first, second = from_config(SD1), from_config(SD21)
    assert (first.kind, second.kind) == ("pndm", "ddim")
    assert first.settings == make_scheduler("pndm").settings
    assert second.settings.prediction_type == "v_prediction"
    assert first.plan(50).timesteps[[0, 1, 2, -1]].tolist() == [981, 961, 961, 1]
    np.testing.assert_allclose(first.schedule.alphas_cumprod[[0, -1]], [0.99915, 0.0046602], rtol=1e-4)
    assert second.replace_kind("euler", use_karras_sigmas=True).settings.use_karras_sigmas
    assert second.replace_kind("euler").replace_kind("ddim").settings == second.settings


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_from_config_reads_what_diffusers_saves(kind):
    saved = {k: v for k, v in theirs(kind, SD1).config.items() if k != "_use_default_values"}
    scheduler = from_config(saved)
    assert scheduler.kind == kind
    assert scheduler.settings == make_scheduler(kind).settings
    plan = scheduler.replace_kind("dpmpp_2m" if kind != "dpmpp_2m" else "euler").plan(20)
    assert plan.calls == 20


def test_ours_and_diffusers_kinds_are_the_same():
    assert set(schedulers.scheduler.CLASSES) == {name for name, _ in CLASSES.values()}
    assert set(CLASSES) == set(SCHEDULERS) == set(schedulers.plan.METHODS) == set(diffusion.SCHEDULERS)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_scheduler("ddim").plan(0), r"steps=0 must be a whole number in 1\.\.1000"),
        (lambda: make_scheduler("ddim").plan(1001), r"steps=1001 must be a whole number in 1\.\.1000"),
        (lambda: make_scheduler("ddim").plan(20.0), r"steps=20\.0 must be a whole number"),
        (lambda: make_scheduler("ddim").plan(1000), r"reaches timestep 1000 of 0\.\.999; use fewer steps"),
        (lambda: make_scheduler("unipc").plan(1000), "steps=1000 is too many"),
        (lambda: make_scheduler("lcm").plan(51), "steps <= original_inference_steps"),
        (lambda: make_scheduler("ddim").plan(20, 0.0), r"strength=0\.0 must be above 0"),
        (lambda: make_scheduler("ddim").plan(20, 1.5), r"strength=1\.5 must be above 0 and at most 1"),
        (lambda: make_scheduler("ddim").plan(20, float("nan")), "strength=nan must be"),
        (lambda: make_scheduler("ddim").plan(20, 0.04), r"strength=0\.04 leaves none of steps=20; use .* 1/20"),
        (lambda: make_scheduler("eular"), r"unknown scheduler 'eular' \(did you mean 'euler'\?\)"),
        (lambda: make_scheduler("ddim", {"beta_strat": 0.1}), r"'beta_strat' \(did you mean 'beta_start'\?\)"),
        (lambda: make_scheduler("ddim", {"beta_start": "0.1"}), "beta_start='0.1' is not of type float"),
        (lambda: make_scheduler("ddim", {"steps_offset": True}), "steps_offset=True is not of type int"),
        (lambda: make_scheduler("ddim", {"clip_sample": 1}), "clip_sample=1 is not of type bool"),
        (lambda: make_scheduler("ddim", {"steps_offset": -1}), "steps_offset=-1 must not be below 0"),
        (lambda: make_scheduler("ddim", {"num_train_timesteps": 0}), "num_train_timesteps=0 must be above 0"),
        (lambda: make_scheduler("ddim", {"beta_end": 2.0}), r"betas must lie in \(0, 1\]"),
        (lambda: make_scheduler("ddim", {"prediction_type": "v"}), "prediction_type='v' is not supported by ddim"),
        (lambda: make_scheduler("ddim", {"thresholding": True}), "thresholding=True is not supported by ddim"),
        (lambda: make_scheduler("euler", {"trained_betas": [0.1]}), "trained_betas"),
        (lambda: make_scheduler("euler", {"clip_sample": True}), "euler has no clip_sample; set it to false, or use"),
        (lambda: make_scheduler("ddim", KARRAS), "ddim has no use_karras_sigmas"),
        (lambda: make_scheduler("heun", ZERO_SNR), "heun has no rescale_betas_zero_snr"),
        (lambda: make_scheduler("ddim", ZERO_SNR | {"prediction_type": "epsilon"}), "'epsilon' is undefined"),
        (lambda: make_scheduler("pndm", {"skip_prk_steps": False}), "skip_prk_steps"),
        (lambda: make_scheduler("pndm", {}), "without its Runge-Kutta steps: set skip_prk_steps to true"),
        (lambda: make_scheduler("pndm", SD1 | {"prediction_type": "sample"}), "needs another scheduler"),
        (lambda: make_scheduler("dpmpp_2m", {"solver_order": 3}), "dpmpp_2m is of order 2, not solver_order=3"),
        (lambda: make_scheduler("dpmpp_2m", {"algorithm_type": "dpmsolver"}), "algorithm_type='dpmsolver'"),
        (lambda: make_scheduler("unipc", {"lower_order_final": False}).plan(20), "must end at noise"),
        (lambda: from_config({"beta_start": 0.1}), "unknown _class_name=None"),
        (lambda: from_config({"_class_name": "DDIMSchedular"}), "did you mean 'DDIMScheduler'"),
        (lambda: run(make_scheduler("ddpm").plan(2), lambda x, t: x, jnp.ones(SHAPE)), "ddpm draws noise .* keys_B"),
        (lambda: run(make_scheduler("ddim").plan(2), lambda x, t: x[..., :1], jnp.ones(SHAPE)), "the model must give"),
        (lambda: run(make_scheduler("ddim").plan(2), lambda x, t: x, jnp.ones(SHAPE), first=1), "needs the carry"),
    ],
)
def test_bad_input_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
