"""The text pipeline makes diffusers' pictures: from text, from a picture, within a mask; and what it promises beside."""

import json
import shutil
import sys

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sd import WORDS, make_folder

import jdiff
from jdiff import sharding
from jdiff.diffusion import SCHEDULERS
from jdiff.pipelines.rows import in_slices, spread

KINDS = {
    "pndm": diffusers.PNDMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}
MODES = ("text", "image", "mask", "repaint")
PROMPTS = ["a red fox under the old tree", "two green apples"]
NEGATIVE = "blue"
STEPS = 20
SIZE = (32, 48)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By the UNet's channels: one that makes pictures, one that repaints them."""
    return {n: make_folder(tmp_path_factory.mktemp(f"sd{n}"), n) for n in (4, 9)}


@pytest.fixture(scope="module")
def pipes(folders):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return {n: jdiff.pipeline(folder, mesh=mesh) for n, folder in folders.items()}


@pytest.fixture(scope="module")
def pipe(pipes):
    return pipes[4]


@pytest.fixture(scope="module")
def peers(folders):
    """diffusers' pipelines by mode, their parts shared."""
    quiet = {"safety_checker": None, "local_files_only": True}
    first = diffusers.StableDiffusionPipeline.from_pretrained(folders[4], **quiet)
    repaint = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folders[9], **quiet)
    parts = first.components
    found = {
        "text": first,
        "image": diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False),
        "mask": diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False),
        "repaint": repaint,
    }
    for peer in found.values():
        peer.set_progress_bar_config(disable=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield found
    torch.set_num_threads(threads)


@pytest.fixture
def draws(monkeypatch):
    """What diffusers draws from now on, by what it is for: NumPy's numbers in place of a generator's."""
    rng, found = np.random.default_rng(0), {"latents": [], "posterior": [], "steps": []}

    def recorded(kind):
        def randn_tensor(shape, **_):
            noise = rng.normal(size=tuple(shape)).astype(np.float32)
            found[kind].append(noise.transpose(0, 2, 3, 1))
            return torch.tensor(noise)

        return randn_tensor

    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and "randn_tensor" in vars(module):
            kind = "steps" if ".schedulers." in name else "posterior" if ".autoencoders." in name else "latents"
            monkeypatch.setattr(module, "randn_tensor", recorded(kind))
    return found


def pictures():
    """A picture and a mask, smooth enough to tell one place from another."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] / SIZE[0]
    image = np.stack([y, x / 1.5, 0.5 + 0.5 * np.sin(9 * x)], axis=-1)
    mask = ((y - 0.4) ** 2 + (x - 0.7) ** 2 < 0.1).astype(np.uint8)
    return Image.fromarray(np.uint8(255 * image)), Image.fromarray(255 * mask)


def compare(peers, pipes, draws, name, mode, steps=STEPS, strength=0.6, tolerance=2, **settings):
    peer, pipe = peers[mode], pipes[9 if mode == "repaint" else 4]
    extra = {"algorithm_type": "sde-dpmsolver++"} if name.endswith("sde") else {}
    given = {**settings.pop("config", {}), **extra}
    peer.scheduler = KINDS[name].from_config({**pipe_config(pipe), **given})
    scheduler = pipe.scheduler.replace_kind(name, **given)
    image, mask = pictures()
    height, width = SIZE
    common = {"guidance_scale": 5.0, "negative_prompt": NEGATIVE, **settings}
    theirs = {**common, "negative_prompt": [common["negative_prompt"]] * len(PROMPTS), "num_inference_steps": steps}
    ours = {**common, "steps": steps, "scheduler": scheduler}
    if mode == "text":
        theirs |= {"height": height, "width": width}
        ours |= {"height": height, "width": width}
    else:
        theirs |= {"image": [image] * len(PROMPTS), "strength": strength}
        ours |= {"image": image, "strength": strength}
    if mode in ("mask", "repaint"):
        theirs |= {"mask_image": [mask] * len(PROMPTS), "height": height, "width": width}
        ours |= {"mask": mask}
    expected = [np.asarray(x, int) for x in peer(PROMPTS, **theirs).images]

    noise = {}
    posterior = draws["posterior"]
    if mode in ("image", "mask") or (mode == "repaint" and strength < 1):
        noise["image"] = posterior[0]
    if mode == "repaint":
        noise["masked"] = posterior[-1]
    (latents,) = draws["latents"]
    plan = scheduler.plan(steps, strength if mode != "text" else 1.0)
    if draws["steps"]:
        noise["steps"] = np.zeros((plan.calls, *latents.shape), np.float32)
        noise["steps"][: len(draws["steps"])] = draws["steps"]
    found = [np.asarray(x, int) for x in pipe(PROMPTS, latents=latents, noise=noise, **ours)]
    assert np.shape(found) == np.shape(expected) == (len(PROMPTS), *SIZE, 3)
    assert np.std(expected) > 20 and np.abs(expected[0] - expected[1]).mean() > 5
    assert np.abs(np.subtract(found, expected)).max() <= tolerance


def pipe_config(pipe):
    return dict(pipe.scheduler.given)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_text_to_image_equals_diffusers(peers, pipes, draws, name):
    compare(peers, pipes, draws, name, "text")


@pytest.mark.parametrize(
    ("name", "mode", "strength"),
    [("dpmpp_2m", "image", 0.6), ("pndm", "mask", 1.0), ("ddim", "mask", 0.6), ("ddpm", "repaint", 0.6)],
)
def test_from_a_picture_equals_diffusers(peers, pipes, draws, name, mode, strength):
    compare(peers, pipes, draws, name, mode, strength=strength)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.35, 1.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_in_every_mode(peers, pipes, draws, name, mode, strength):
    compare(peers, pipes, draws, name, mode, strength=strength)


@pytest.mark.parametrize(
    "settings", [{"guidance_scale": 1.0, "negative_prompt": ""}, {"guidance_rescale": 0.7}], ids=str
)
def test_guidance_equals_diffusers(peers, pipes, draws, settings):
    compare(peers, pipes, draws, "ddim", "text", **settings)


@pytest.mark.parametrize("config", [{"prediction_type": "v_prediction"}, {"use_karras_sigmas": True}], ids=str)
def test_scheduler_settings_equal_diffusers(peers, pipes, draws, config):
    compare(peers, pipes, draws, "dpmpp_2m", "text", config=config)


def torch_states(peer, rows, weights, skip):
    """Each chunk through the text encoder, its tokens weighted and their mean restored, all chunks in a row."""
    made = []
    for ids, weight in zip(rows, weights, strict=True):
        with torch.no_grad():
            hidden = peer.text_encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-(skip + 1)]
            norm = getattr(peer.text_encoder, "text_model", peer.text_encoder).final_layer_norm
            states = norm(hidden)[0].numpy()
        scaled = states * np.array(weight, np.float32)[:, None]
        mean, least = states.mean(), 0.01 * np.sqrt((states**2).mean())
        # a LayerNorm without bias has mean 0, and then there is nothing to restore
        made.append(scaled * mean / scaled.mean() if min(abs(mean), abs(scaled.mean())) > least else scaled)
    return torch.tensor(np.concatenate(made))[None]


def test_long_and_weighted_prompts_with_clip_skip(peers, pipe, draws):
    """A prompt of two chunks beside a negative prompt of one, which gets an empty chunk."""
    words = (WORDS + " ") * 5
    peer, tokenizer = peers["text"], peers["text"].tokenizer
    plain, heavy, negative = (tokenizer(t, add_special_tokens=False).input_ids for t in (words, "fox", NEGATIVE))
    begin, end, room = tokenizer.bos_token_id, tokenizer.eos_token_id, 75
    ids, weights = plain + heavy, [1.0] * len(plain) + [1.5] * len(heavy)
    assert room < len(ids) < 2 * room
    frame = lambda part, fill, first, last: [first, *part, last] + [fill] * (room - len(part))  # noqa: E731
    chunks = [ids[:room], ids[room:]]
    rows = [frame(part, end, begin, end) for part in chunks]
    row_weights = [frame(part, 1.0, 1.0, 1.0) for part in (weights[:room], weights[room:])]
    nothing = [frame(part, end, begin, end) for part in (negative, [])]
    peer.scheduler = diffusers.DDIMScheduler.from_config(pipe_config(pipe))
    embeds = {
        "prompt_embeds": torch_states(peer, rows, row_weights, 1),
        "negative_prompt_embeds": torch_states(peer, nothing, [[1.0] * 77] * 2, 1),
    }
    common = {"height": SIZE[0], "width": SIZE[1], "guidance_scale": 5.0}
    expected = np.asarray(peer(**embeds, num_inference_steps=5, **common).images[0], int)
    latents = draws["latents"][0]
    ours = {"steps": 5, "scheduler": "ddim", "clip_skip": 1, "latents": latents, **common}
    (found,) = pipe(f"{words} (fox:1.5)", negative_prompt=NEGATIVE, **ours)
    assert np.abs(np.asarray(found, int) - expected).max() <= 2
    (other,) = pipe(f"{words} fox", negative_prompt=NEGATIVE, **ours)
    assert np.abs(np.asarray(other, int) - expected).max() > 2


QUICK = {"steps": 3, "height": 16, "width": 16, "output": "np", "scheduler": "euler_ancestral"}
LONG = "the big red fox " * 40


def close(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-3


@pytest.mark.runs
def test_a_picture_does_not_depend_on_its_batch_or_devices(pipe, folders):
    prompts = ["a red fox", LONG, "two green apples"]
    together = pipe(prompts, seed=3, **QUICK)
    assert together.shape == (3, 16, 16, 3) and not close(together[0], together[2])
    for i, prompt in enumerate(prompts):
        assert close(pipe(prompt, seed=3, first_index=i, **QUICK)[0], together[i])
    spread = jdiff.pipeline(folders[4], mesh=sharding.make_mesh(devices=jax.devices()[:4]))
    assert close(spread(prompts, seed=3, **QUICK), together)
    same = pipe([prompts[0]] * 2, seed=[7, 3], **QUICK)
    assert close(same[1], together[0]) and not close(same[0], same[1])
    running = pipe([prompts[0]] * 2, seed=3, **QUICK)
    assert not close(running[0], running[1])


def test_another_prompt_seed_or_guidance_compiles_nothing(pipe):
    settings = {**QUICK, "scheduler": "ddim", "steps": 2}
    pipe("a fox", **settings)
    before = [f._cache_size() for f in (pipe._loop, pipe._encode_text, pipe._decode_rows)]
    pipe("a (red:1.2) tree", negative_prompt="the sun", seed=5, guidance_scale=3.0, **settings)
    seen = []
    pipe("a fox", callback=lambda *call: seen.append(call), **settings)
    assert [f._cache_size() for f in (pipe._loop, pipe._encode_text, pipe._decode_rows)] == before
    assert len(seen) == 2


def test_outputs_and_callback(pipe):
    settings = {**QUICK, "scheduler": "pndm"}
    seen = []

    def callback(done, total, preview):
        seen.append((done, total, preview()))

    array = pipe(["a fox", LONG], callback=callback, callback_every=3, **settings)
    # pndm calls the model once more than it has steps; the long prompt is made after the short one
    assert [(done, total) for done, total, _ in seen] == [(3, 8), (4, 8), (7, 8), (8, 8)]
    assert array.dtype == np.float32 and array.min() >= 0 and array.max() <= 1
    for (_, _, preview), whole in zip(seen[1::2], array, strict=True):
        assert preview.dtype == np.uint8 and preview.shape == (1, 16, 16, 3)
        assert np.abs(preview[0] - 255 * whole).max() < 0.51
    images = pipe(["a fox", LONG], **{**settings, "output": "pil"})
    assert np.abs(np.stack([np.asarray(image) for image in images]) - 255 * array).max() < 0.51
    latents = pipe("a fox", **{**settings, "output": "latent"})
    assert latents.shape == (1, 8, 8, 4) and latents.dtype == np.float32


def test_the_image_is_kept_where_nothing_is_asked(pipe):
    """With an empty mask nothing is made anew, and what comes back is the image through the autoencoder."""
    image, _ = pictures()
    nothing = np.zeros((*SIZE, 1), np.uint8)
    settings = {"steps": 3, "scheduler": "euler", "output": "latent"}
    zero = {"image": np.zeros((1, 16, 24, 4))}
    kept = pipe("a fox", image=image, mask=nothing, noise=zero, **settings)
    mode = pipe.vae.apply({"params": pipe.params["vae"]}, np.asarray(image)[None] / 127.5 - 1, method="encode").mode()
    assert np.abs(kept - mode * pipe.vae.scaling_factor).max() < 1e-3
    other = pipe("a fox", image=image, mask=nothing + 255, noise=zero, **settings)
    assert np.abs(kept - other).max() > 0.1


def test_images_in_every_form(pipe):
    image, mask = pictures()
    settings = {"steps": 2, "scheduler": "ddim", "strength": 0.5, "output": "np"}
    expected = pipe(["a fox", "a tree"], image=image, mask=mask, **settings)
    array, flat = np.asarray(image), np.asarray(mask)
    for form, form_mask in (
        (array, flat),
        (np.float64(array / 255), flat > 127),
        ([image, array], [mask, flat[..., None]]),
        (np.stack([array, array]), mask.convert("1")),
    ):
        assert close(pipe(["a fox", "a tree"], image=form, mask=form_mask, **settings), expected)


def test_large_pictures_are_decoded_in_tiles(pipe, monkeypatch):
    settings = {"steps": 1, "height": 200, "width": 32, "output": "np", "scheduler": "ddim"}
    tiled = pipe("a fox", **settings)
    monkeypatch.setattr("jdiff.pipelines.text.TILED_ABOVE", 100)
    whole = pipe("a fox", **settings)
    # norms over a tile are not those over the picture: near, not equal
    assert tiled.shape == whole.shape == (1, 200, 32, 3)
    assert 0 < np.abs(tiled - whole).mean() < 0.05 < whole.std()


@pytest.mark.parametrize("at_once", [1, 2, 3, 6, 100])
def test_slices_give_what_the_whole_gives(at_once):
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    x = np.arange(24.0, dtype=np.float32).reshape(12, 2)
    rows = spread(mesh, {"x": x})["x"]
    largest = []

    def function(pair):
        largest.append(len(pair[0]))
        return pair[0] + pair[1] ** 2

    found = jax.jit(lambda x: in_slices(function, (x, 2 * x), mesh, at_once))(rows)
    np.testing.assert_array_equal(found, x + 4 * x**2)
    assert max(largest) <= 2 * at_once


def test_not_a_number_is_named(pipe):
    bad = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), pipe.params["vae"])
    with pytest.raises(FloatingPointError, match=r"'a fox' .seed 4, index 2.*float32"):
        pipe("a fox", seed=4, first_index=2, params={"vae": bad}, **QUICK)


def test_facts(pipe):
    image, mask = pictures()
    first, second = pipe.facts(["a fox", "b"], seed=[4, 5], scheduler="euler", image=image, mask=mask, strength=0.5)
    assert json.loads(json.dumps(first)) == first
    assert first["prompt"] == "a fox" and second["seed"] == 5 and second["prompt"] == "b"
    expected = {"steps": 50, "scheduler": "euler", "guidance_scale": 7.5, "height": 32, "width": 48, "strength": 0.5}
    assert expected.items() <= first.items() and first["mask"] and first["jdiff"] == jdiff.__version__
    assert first["model"] == pipe.model_hash and len(pipe.model_hash) == 16
    (plain,) = pipe.facts("a fox")
    assert plain["height"] == plain["width"] == 16 and plain["scheduler"] == "pndm" and "strength" not in plain


MISTAKES = [
    ({"steps": 0}, "steps=0"),
    ({"prompt": []}, "prompt is empty"),
    ({"negative_prompt": ["a", "b"]}, "2 texts for 1"),
    ({"seed": [1, 2]}, "2 numbers for 1"),
    ({"seed": -1}, "found -1"),
    ({"height": 31}, "height=31 must be a multiple of 2, such as"),
    ({"width": 0}, "width=0"),
    ({"strength": 0.5}, "strength=0.5 without image"),
    ({"scheduler": "eular"}, "did you mean 'euler'"),
    ({"output": "jpg"}, "'jpg'"),
    ({"callback_every": 0}, "callback_every=0"),
    ({"guidance_scale": 1.0, "negative_prompt": "blue"}, "'blue' does nothing at guidance_scale=1"),
    ({"guidance_rescale": 2.0}, "guidance_rescale=2.0"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"clip_skip": 2}, "clip_skip=2"),
    ({"latents": np.zeros((1, 4, 8, 8))}, r"\(1, 4, 8, 8\), expected \(1, 8, 8, 4\)"),
    ({"noise": {"stpes": np.zeros(1)}}, "'stpes'"),
    ({"noise": {"image": np.zeros(1)}}, r"\(1,\), expected"),
    ({"mask": np.zeros((16, 16))}, "mask without image"),
    ({"image": "fox.png"}, "image is a str"),
    ({"image": [3]}, "image is a int"),
    ({"image": np.zeros((16, 16))}, r"\(16, 16\), expected \(height, width, 3\)"),
    ({"image": np.zeros((16, 16, 3), int)}, "int64"),
    ({"image": np.full((16, 16, 3), 2.0)}, "2..2"),
    ({"image": np.zeros((17, 16, 3))}, "height=17 must be a multiple"),
    ({"image": np.zeros((16, 16, 3)), "height": 32}, "16 x 16 and 32 x 16"),
    ({"image": [np.zeros((16, 16, 3))] * 2}, "2 pictures for 1"),
    ({"image": np.zeros((16, 16, 3)), "strength": 0.0}, "strength=0.0"),
    ({"image": np.zeros((16, 16, 3)), "strength": 1.1}, "strength=1.1"),
    ({"image": np.zeros((16, 16, 3)), "strength": 0.01}, "strength=0.01 leaves none"),
    ({"image": np.zeros((16, 16, 3)), "mask": np.zeros((16, 18))}, "mask is 16 x 18 and the image 16 x 16"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_is_one_line(pipe, arguments, said):
    with pytest.raises((ValueError, TypeError), match=said) as error:
        pipe(**{"prompt": "a fox", "steps": 2, **arguments})
    assert "\n" not in str(error.value)


def test_a_repainting_unet_wants_a_mask(pipes):
    for arguments in ({}, {"image": np.zeros((16, 16, 3))}):
        with pytest.raises(ValueError, match="give image and mask"):
            pipes[9]("a fox", **arguments)


def changed(folder, to, change):
    shutil.copytree(folder, to)
    change(to)
    return to


def edit(name, **changes):
    def change(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: [p.unlink() for p in (f / "tokenizer").glob("*.json")], "tokenizer.*vocab.json and"),
        (lambda f: shutil.rmtree(f / "vae"), "lacks the folder.*vae"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json"),
        (edit("model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
        (edit("model_index.json", controlnet=["diffusers", "ControlNetModel"]), "controlnet"),
        (edit("unet/config.json", cross_attention_dim=16), "shape|width"),
        (edit("scheduler/scheduler_config.json", beta_schedule="sigmoid"), "sigmoid"),
    ],
    ids=["tokenizer", "vae", "scheduler", "class", "part", "unet", "setting"],
)
def test_a_broken_folder_is_one_line(folders, tmp_path, change, said):
    with pytest.raises(ValueError, match=said) as error:
        jdiff.pipeline(changed(folders[4], tmp_path / "sd", change))
    assert "\n" not in str(error.value)


def test_the_safety_checker_is_passed_over(folders, tmp_path):
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    folder = changed(folders[4], tmp_path / "sd", edit("model_index.json", **checker))
    assert jdiff.pipeline(folder).geometry.downscale == 2


def test_a_component_folder_loads(folders):
    vae, params = jdiff.load(folders[4] / "vae")
    assert vae.downscale == 2 and params["encoder"]["conv_in"]["kernel"].shape == (3, 3, 3, 32)
