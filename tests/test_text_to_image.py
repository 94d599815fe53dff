"""Training on captions: the loss and its gradient equal PyTorch's, a stopped run goes on as if it had not been, and mistakes
are one line."""

import json
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import jdiff
from jdiff import checkpoint, convert, loading, models, sharding, train, tree, weights
from jdiff import config as configs
from jdiff.diffusion import schedulers
from jdiff.diffusion.process import make_text_process, make_text_scheduler, scheduler_record
from jdiff.pipelines import TextPipeline, grid
from jdiff.qtensor import QTensor
from jdiff.report import SPEED
from jdiff.tasks import make_task, mean_gradient
from jdiff.tasks.text_to_image import TextToImage, text_loss
from jdiff.tokens import Tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
UNET = {
    **{"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 16},
    **{
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "attention_head_dim": 2,
}
VAE = {
    **{"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
}
pytestmark = pytest.mark.usefixtures("compiled")
TEXT = {"vocab_size": 530, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def captions(count):
    return [f"a {name} square, number {i}" for i, name in enumerate(list(COLOURS) * (count // 3))]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """24 pictures of four shapes with a .txt each."""
    folder = tmp_path_factory.mktemp("captions") / "pictures"
    folder.mkdir()
    for i, caption in enumerate(captions(24)):
        size = ((20, 20), (16, 30), (30, 16), (20, 21))[i % 4]
        Image.new("RGB", size, list(COLOURS.values())[i % 3]).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny pipeline's folder, as diffusers and transformers save it."""
    folder = tmp_path_factory.mktemp("base") / "sd"
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(captions(24), 530, 16)
    assert tokenizer.vocab_size <= TEXT["vocab_size"]
    tokenizer.save(folder / "tokenizer")
    text = CLIPTextModel(CLIPTextConfig(**TEXT, max_position_embeddings=16))
    parts = {"unet": UNet2DConditionModel(**UNET), "vae": AutoencoderKL(**VAE), "text_encoder": text}
    parts["scheduler"] = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {"_class_name": "StableDiffusionPipeline", **{name: ["diffusers", "…"] for name in (*parts, "tokenizer")}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_config(pictures, **changes):
    """A tiny model from nothing, but for its autoencoder, that trains its text encoder too."""
    config = configs.default("text_to_image")
    values = {
        **{
            "data.name": "captions",
            "data.path": str(pictures),
            "data.image_size": 16,
            "batch_size": 8,
            "total_steps": 8,
        },
        **{"checkpoint_every": 4, "sample_every": 4, "log_every": 1, "log.tensorboard": False, "optim.lr": 1e-3},
        **{"unet.block_out_channels": (8, 16), "unet.attention": (False, True), "unet.heads": (2, 2)},
        **{"unet.norm_num_groups": 4, "unet.layers_per_block": 1, "text.train": True, "text.vocab_size": 530},
        **{"text.width": 16, "text.hidden": 32, "text.layers": 2, "text.heads": 2, "text.max_length": 16},
        **{"sample.steps": 2, "sample.prompts": ("a red square", "a blue square")},
    }
    config.update_from_flattened_dict({**values, **changes})
    return config


def from_base(pictures, base, **changes):
    """The same, started from the base's models and without their sizes."""
    config = make_config(pictures)
    default = configs.flat(configs.default("text_to_image"))
    sizes = {key: value for key, value in default.items() if key.startswith(("unet.", "text."))}
    config.update_from_flattened_dict({**sizes, "init_from": str(base), **changes})
    return config


def make(config, workdir=None):
    return TextToImage(config, sharding.make_mesh(), workdir)


def settings(**changes):
    return {**configs.default("text_to_image").diffusion.to_dict(), **changes}


# --- the loss


def torch_step(base, image, ids, t, noise, posterior_noise, prediction_type, gamma):
    """(loss per sample, gradients of the mean by model) of a step in PyTorch, float64; both models trained."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet").double()
    half = unet.time_proj.num_channels // 2  # diffusers forms the timestep's sinusoids in float32
    waves = lambda t: t.double()[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)  # noqa: E731
    unet.time_proj.forward = lambda t: torch.cat([waves(t).cos(), waves(t).sin()], -1)
    vae = AutoencoderKL.from_pretrained(base / "vae").double()
    text = CLIPTextModel.from_pretrained(base / "text_encoder").double()
    nchw = lambda x: torch.tensor(np.asarray(x, np.float64)).permute(0, 3, 1, 2)  # noqa: E731
    with torch.no_grad():
        posterior = vae.encode(nchw(image) / 127.5 - 1).latent_dist
        x_0 = (posterior.mean + posterior.std * nchw(posterior_noise)) * vae.config.scaling_factor
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[torch.tensor(t)]
    a, s = (x.reshape(-1, 1, 1, 1) for x in (abar.sqrt(), (1 - abar).sqrt()))
    eps = nchw(noise)
    target = {"eps": eps, "v": a * eps - s * x_0, "x0": x_0}[prediction_type]
    context = text(torch.tensor(ids, dtype=torch.long)).last_hidden_state
    found = unet(a * x_0 + s * eps, torch.tensor(t), context).sample
    loss = (found - target).square().mean((1, 2, 3))
    if gamma is not None:
        snr = abar / (1 - abar)
        loss = loss * snr.clamp(max=gamma) / {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction_type]
    loss.mean().backward()
    grads = {
        name: {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}
        for name, model in (("unet", unet), ("text", text))
    }
    return loss.detach().numpy(), grads


@pytest.mark.parametrize(
    ("prediction_type", "gamma"),
    [("eps", 5.0), ("v", None), *(pytest.param(p, 5.0, marks=pytest.mark.slow) for p in ("v", "x0"))],
)
def test_a_steps_loss_and_gradient_equal_torch(base, prediction_type, gamma):
    """From uint8 pictures and tokens to the gradients of the UNet and the text encoder, in float64."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 12, 16, 3), dtype=np.uint8)
    tokenizer = Tokenizer.from_folder(base / "tokenizer")
    ids = tokenizer(captions(3))
    keys_B = train.sample_keys(0, jnp.int32(0), 3)
    config = settings(prediction_type=prediction_type, snr_gamma=gamma)
    with jax.enable_x64(True):
        # the draws of `text_loss` and `Process.losses`, by their keys
        keys_B3 = jax.vmap(lambda key: jax.random.split(key, 3))(keys_B)
        posterior_noise = jax.vmap(lambda key: jax.random.normal(key, (6, 8, 4), jnp.float64))(keys_B3[:, 1])
        keys_B2 = jax.vmap(jax.random.split)(keys_B3[:, 2])
        noise = jax.vmap(lambda key: jax.random.normal(key, (6, 8, 4), jnp.float64))(keys_B2[:, 0])
        t_B = jax.vmap(lambda key: jax.random.randint(key, (), 0, 1000, jnp.int32))(keys_B2[:, 1])
        parts = {"unet": "unet", "text": "text_encoder", "vae": "vae"}
        loaded = {name: convert.load_component(base / part, jnp.float64) for name, part in parts.items()}
        modules = {name: module for name, (module, _) in loaded.items()}
        full = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), {name: params for name, (_, params) in loaded.items()}
        )
        scheduler = make_text_scheduler(config, "ddim")
        loss_fn = text_loss(**modules, process=make_text_process(config, scheduler), null=tokenizer.null)
        params, frozen = tree.set_apart(full, "vae/.*")
        batch = {"image": jnp.asarray(image), "tokens": jnp.asarray(ids)}
        grads, losses = jax.jit(mean_gradient(loss_fn))(params, frozen, batch, keys_B, jnp.int32(0))
        grads = jax.tree.map(np.asarray, grads)
        losses = jax.tree.map(np.asarray, losses)
    expected, peer = torch_step(base, image, ids, np.asarray(t_B), noise, posterior_noise, prediction_type, gamma)
    np.testing.assert_allclose(losses["loss"], expected, rtol=1e-8)
    for name in ("unet", "text"):
        found = convert.to_torch(modules[name], grads[name])
        # transformers' newer key tables leave out this prefix
        theirs = {key.removeprefix("text_model."): value for key, value in peer[name].items()}
        assert len(theirs) == len(found)
        for key, value in found.items():
            np.testing.assert_allclose(
                value, theirs[key.removeprefix("text_model.")], rtol=1e-6, atol=1e-9, err_msg=key
            )


class Echo:
    """Stands in for the text encoder: a token's state is its id; or for the UNet, which is told what it was given."""

    def __init__(self):
        self.seen = []

    def apply(self, variables, x, *rest, **options):
        if not rest:
            return jnp.stack([x, x], -1).astype(jnp.float32)
        self.seen.append(rest[1])
        return jnp.zeros_like(x)


@pytest.mark.parametrize("kind", ["tokens", "two chunks of tokens", "context"])
def test_captions_are_dropped_at_their_rate_and_become_the_null_prompt(kind):
    rows, S = 4000, 3
    null = np.array([7, 8, 9], np.int32) if kind != "context" else np.full((S, 2), 7.0, np.float32)
    n = 2 if kind.startswith("two") else 1
    words = np.ones((rows, n * S), np.int32) if kind != "context" else np.ones((rows, S, 2), np.float32)
    unet, config = Echo(), settings()
    process = make_text_process(config, make_text_scheduler(config, "ddim"))
    loss_fn = text_loss(unet, Echo(), None, process, null, 0.25)
    batch = {"latent": jnp.zeros((rows, 2, 2, 4)), ("context" if kind == "context" else "tokens"): jnp.asarray(words)}
    loss_fn({"unet": {}, "text": {}, "vae": {}}, batch, train.sample_keys(0, jnp.int32(0), rows))
    context = np.asarray(unet.seen[0])
    assert context.shape == (rows, n * S, 2)
    dropped = (context != 1).any((1, 2))
    assert abs(dropped.mean() - 0.25) < 0.03
    expected = null if kind == "context" else np.stack([np.tile(null, n)] * 2, -1)
    assert (context[dropped] == expected).all() and (context[~dropped] == 1).all()


# --- the scheduler's settings


def test_the_scheduler_says_in_diffusers_terms_what_was_trained():
    plain = make_text_scheduler(settings(), "ddim")
    assert plain.settings.prediction_type == "epsilon" and plain.settings.beta_schedule == "scaled_linear"
    config = settings(prediction_type="v", zero_terminal_snr=True, schedule="linear")
    for kind in schedulers.SCHEDULERS:
        if kind in ("pndm", "heun"):  # cannot run to zero SNR
            continue
        scheduler = make_text_scheduler(config, kind)
        again = schedulers.from_config(json.loads(json.dumps(scheduler_record(scheduler))))
        assert again.kind == kind and again.settings == scheduler.settings
        assert scheduler.settings.timestep_spacing == "trailing" and scheduler.schedule.alphas_cumprod[-1] == 0
        process = make_text_process(config, scheduler)
        assert process.prediction_type == "v" and process.schedule == scheduler.schedule


def test_a_base_lends_its_schedule():
    base = {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01, "prediction_type": "v_prediction"}
    scheduler = make_text_scheduler(settings(), "ddim", base)
    assert scheduler.settings.beta_end == 0.01 and make_text_process(settings(), scheduler).prediction_type == "v"
    other = make_text_scheduler(settings(schedule="scaled_linear", prediction_type="eps"), "ddim", base)
    assert other.settings.beta_end == 0.012 and other.settings.prediction_type == "epsilon"


def test_eps_with_zero_terminal_snr_is_refused(pictures, base):
    config = from_base(pictures, base, **{"diffusion.zero_terminal_snr": True})
    with pytest.raises(ValueError, match=r"zero|rescale"):
        make(config)


# --- runs


def outcome(workdir, step=8):
    """All that a run leaves: its last checkpoint's checksums and its records, without the machine's speed."""
    meta = checkpoint.read_meta(workdir, step)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in line.items() if k not in SPEED} for line in lines]
    pictures = {p.name: p.read_bytes() for p in (workdir / "samples").glob("*.png")}
    return {"checksums": meta["checksums"], "records": records, "pictures": pictures}


@pytest.fixture(scope="module")
def whole(pictures, base, tmp_path_factory):
    """A run from nothing that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("text") / "run"
    train.fit(make_config(pictures, **{"vae.path": str(base / "vae")}), workdir)
    return workdir


@pytest.mark.runs
def test_a_resumed_run_equals_an_uninterrupted_one(whole, pictures, base, tmp_path):
    workdir, vae = tmp_path / "run", {"vae.path": str(base / "vae")}
    train.fit(make_config(pictures, total_steps=4, **vae), workdir)
    assert (workdir / "tokenizer").is_dir()
    train.fit(make_config(pictures, **vae), workdir)
    found, expected = outcome(workdir), outcome(whole)
    assert [record["step"] for record in found["records"]] == list(range(1, 9))
    assert found == expected


@pytest.mark.runs
def test_a_checkpoint_says_all_that_a_pipeline_needs(whole):
    meta = checkpoint.read_meta(whole, 8)
    built = {name: models.build(record) for name, record in meta["models"].items()}
    assert set(built) == {"unet", "text", "vae"} and meta["main"] == "unet"
    assert built["unet"].cross_attention_dim == built["text"].width == 16
    tokenizer = Tokenizer.from_folder(whole / "tokenizer")
    assert tokenizer.fingerprint == meta["tokenizer"] and tokenizer.vocab_size == built["text"].vocab_size
    assert schedulers.from_config(meta["scheduler"]).kind == "ddim" and meta["size"] == [16, 16]
    facts = json.loads(Image.open(whole / "samples" / "step_00000008.png").text["jdiff"])
    assert facts["prompts"] == ["a red square", "a blue square"]


@pytest.mark.runs
def test_a_runs_pipeline_draws_the_grid(whole):
    """The tokenizer, the scheduler and the average are found again: the last validation pictures, bit by bit."""
    prompts, pipe = ["a red square", "a blue square"], jdiff.pipeline(whole)
    assert isinstance(pipe, TextPipeline)
    found = [np.asarray(picture) for picture in pipe(prompts, steps=2, guidance_scale=7.5, seed=0)]
    expected = Image.open(whole / "samples" / "step_00000008.png")
    assert np.array_equal(grid(np.stack(found)), expected) and len(np.unique(expected)) > 2


@pytest.mark.runs
def test_only_what_should_is_trained(pictures, base, tmp_path):
    original = {
        name: convert.load_component(base / part)[1]
        for name, part in {"unet": "unet", "text": "text_encoder", "vae": "vae"}.items()
    }
    for trained in (False, True):
        setup = train.Setup(from_base(pictures, base, **{"text.train": trained}))
        state = setup.fresh_state()
        full = tree.merge(state.params, state.frozen)
        for path, leaf in tree.flatten(original).items():
            np.testing.assert_array_equal(tree.flatten(full)[path], leaf, err_msg=path)  # the base's own weights
        rows = train.data.batches(setup.source, batch_size=8, seed=0, flip=False, transform=setup.task.transform)
        with rows as batches:
            batch = sharding.put_batch(setup.mesh, next(batches))
        assert batch["tokens"].shape == (8, 16) and batch["image"].dtype == np.uint8
        state, _ = setup.step(state, batch)
        new = tree.flatten(tree.merge(state.params, state.frozen))
        for name in original:
            paths = [path for path in tree.flatten(original) if path.startswith(f"{name}/")]
            moved = [path for path in paths if not np.array_equal(new[path], tree.flatten(original)[path])]
            expected = name == "unet" or (name == "text" and trained)
            assert (len(moved) > 0.9 * len(paths)) if expected else not moved, (name, moved)
        kept = {path.split("/")[0] for path in tree.flatten(state.opt_state[0].mu)}
        assert kept == ({"unet", "text"} if trained else {"unet"})


@pytest.mark.slow
def test_buckets_train_with_one_shape_each(pictures, base, tmp_path, caplog):
    changes = {"buckets.use": True, "buckets.step": 4, "vae.path": str(base / "vae"), "total_steps": 6}
    config, shapes = make_config(pictures, **changes), set()
    setup = train.Setup(config)
    with caplog.at_level(logging.INFO):
        batches = setup.batches(0, tmp_path)
    state = setup.fresh_state()
    with batches:
        for _ in range(6):
            batch = next(batches)
            shapes.add(batch["image"].shape)
            state, metrics = setup.step(state, sharding.put_batch(setup.mesh, batch))
            assert np.isfinite(metrics["loss"]) and not metrics["refused"]
    assert len(shapes) > 1 and all(h * w <= 256 for _, h, w, _ in shapes)
    assert setup.step._cache_size() == len(shapes)
    assert "bucket" in caplog.text and "padding" in caplog.text


# --- caches of latents


def cache(commands, pictures, base, dest, *flags):
    arguments = (f"captions:{pictures}", dest, "--vae", base / "vae", "--image-size", 16, "--batch-size", 4, *flags)
    result = commands.run("tools/cache_latents.py", *arguments)
    assert result.returncode == 0, result.stderr
    return dest


@pytest.fixture(scope="module")
def caches(commands, pictures, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return {
        "plain": cache(commands, pictures, base, folder / "plain"),
        "text": cache(commands, pictures, base, folder / "text", "--text", base),
    }


def cached(pictures, base, path, **changes):
    return from_base(pictures, base, **{"data.name": "latents", "data.path": str(path), **changes})


@pytest.mark.runs
def test_a_cache_trains(caches, pictures, base, tmp_path):
    config = cached(pictures, base, caches["text"], total_steps=2, sample_every=2)
    train.fit(config, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "step_00000002.png").exists()


@pytest.mark.slow
def test_cached_contexts_are_the_text_encoders(caches, pictures, base, tmp_path):
    """The same tokens and latents, encoded in the step or before, give the same loss."""
    losses = {}
    for kind in ("plain", "text"):
        setup = train.Setup(cached(pictures, base, caches[kind], **{"diffusion.caption_dropout": 0.5}))
        state = setup.fresh_state()
        with setup.batches(0, tmp_path) as batches:
            batch = next(batches)
        assert batch["latent"].shape == (8, 8, 8, 4) and ("tokens" in batch) == (kind == "plain") != (
            "context" in batch
        )
        _, metrics = setup.step(state, sharding.put_batch(setup.mesh, batch))
        losses[kind] = float(metrics["loss"])
    np.testing.assert_allclose(losses["text"], losses["plain"], rtol=1e-3)  # the cache is of float16


# --- mistakes


def line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, r"vae\.path is missing"),
        ({"vae.path": "nowhere"}, r"nowhere does not exist"),
        ({"vae.path": "BASE/unet"}, "holds no vae, which is needed; it holds unet"),
        ({"vae.path": "BASE/vae", "text.train": False}, r"text\.train=false without init_from"),
        ({"vae.path": "BASE/vae", "data.image_size": 17}, r"data\.image_size=17 is no multiple of 2"),
        ({"vae.path": "BASE/vae", "buckets.use": True, "buckets.step": 1}, r"buckets\.step=1 is no multiple of 2"),
        ({"vae.path": "BASE/vae", "data.name": "imagefolder", "data.path": "FOLDER"}, "has no captions"),
        ({"vae.path": "BASE/vae", "text.vocab_size": 100}, "vocab_size=100 is too small"),
        ({"vae.path": "BASE/vae", "sample.scheduler": "dimd"}, "unknown scheduler 'dimd'.*'ddim'"),
        ({"vae.path": "BASE/vae", "sample.steps": 2000}, "2000"),
        ({"vae.path": "BASE/vae", "text.heads": 3}, "heads=3"),
        ({"vae.path": "BASE/vae", "text.clip_skip": 2}, r"text\.clip_skip=2 must be below the text encoder's 2 layers"),
        ({"vae.path": "BASE/vae", "sample.prompts": ()}, r"sample\.prompts is empty"),
        ({"init_from": "BASE"}, r"(unet|text)\.\w+=.* cannot be had with init_from"),
    ],
)
def test_a_mistake_is_one_line(pictures, base, image_folder, changes, said):
    place = lambda v: v.replace("BASE", str(base)).replace("FOLDER", str(image_folder)) if isinstance(v, str) else v  # noqa: E731
    config = make_config(pictures, **{key: place(value) for key, value in changes.items()})
    with pytest.raises(ValueError) as error:
        make(config)
    assert re.search(said, line(error))


def test_missing_captions_are_named(pictures, base, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "alone.png")
    with pytest.raises(ValueError) as error:
        make(make_config(tmp_path, **{"vae.path": str(base / "vae")}))
    assert "alone" in line(error) or "caption" in line(error)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text.train": True}, r"text\.train=true does not go with data\.path="),
        ({"text.clip_skip": 1}, r"text\.clip_skip=1 does not go"),
        ({"captions.shuffle_tags": True}, r"captions\.shuffle_tags=True does not go"),
    ],
)
def test_contexts_go_with_a_fixed_encoder_alone(caches, pictures, base, changes, said):
    with pytest.raises(ValueError) as error:
        make(cached(pictures, base, caches["text"], **changes))
    assert re.search(said, line(error))


def test_a_cache_of_other_latents_is_refused(caches, pictures, base, tmp_path):
    torch.manual_seed(1)
    for channels, said in ((3, "latents of 4 channels, and the autoencoder's have 3"), (4, "another autoencoder")):
        folder = tmp_path / str(channels)
        AutoencoderKL(**{**VAE, "latent_channels": channels}).save_pretrained(folder)
        fresh = make_config(
            pictures, **{"data.name": "latents", "data.path": str(caches["plain"]), "vae.path": str(folder)}
        )
        with pytest.raises(ValueError) as error:
            make(fresh).given()
        assert said in line(error)


def test_contexts_of_another_encoder_are_refused(caches, pictures, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "sd")
    CLIPTextModel(CLIPTextConfig(**TEXT, max_position_embeddings=16)).save_pretrained(other / "text_encoder")
    with pytest.raises(ValueError) as error:
        make(cached(pictures, other, caches["text"])).given()
    assert "another text encoder" in line(error)


@pytest.mark.runs
def test_a_lost_tokenizer_is_said(whole, pictures, base, tmp_path):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(ValueError) as error:
        make(make_config(pictures, **{"vae.path": str(base / "vae")}), tmp_path)
    assert "tokenizer is missing" in line(error)


def test_the_task_is_found_by_its_name(pictures, base):
    task = make_task(make_config(pictures, **{"vae.path": str(base / "vae")}), sharding.make_mesh())
    assert isinstance(task, TextToImage) and task.frozen == "vae/.*"
    assert task.macs() == task.unet.macs(8, 8, text_length=16) + task.text.macs()


@pytest.mark.slow
def test_a_unet_trains_through_integers(pictures, base, tmp_path):
    """It learns scales, two where it concatenates, and its quantized copy takes them."""
    settings = {"total_steps": 2, "checkpoint_every": 2, "sample_every": 2, "quant.mode": "lsq", "optim.lr": 1e-4}
    train.fit(from_base(pictures, base, **settings), tmp_path / "run")
    opened = loading.open_checkpoint(tmp_path / "run")
    parts = opened.models["unet"][0].concatenated()
    assert parts and all(opened.scales[path].shape[-2] == len(sizes) for path, sizes in parts.items())
    made = weights.flatten(loading.quantized(opened, "w8a8").models["unet"][1])
    kernels = {path: leaf for path, leaf in made.items() if isinstance(leaf, QTensor)}
    assert set(kernels) == set(opened.scales)
    for path, leaf in kernels.items():
        np.testing.assert_array_equal(leaf.scale, np.abs(opened.scales[path]))
