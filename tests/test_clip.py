"""CLIP's two towers, its folder and its preparation of pictures equal transformers', on the same random weights."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_sd import captions, make_clip
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import jdiff
from jdiff import convert, models, tree
from jdiff.evaluate.clip import prepared
from jdiff.evaluate.networks import open_network
from jdiff.evaluate.pictures import open_pictures, prompts_of
from jdiff.evaluate.scores import check_metrics, scores
from jdiff.tokens import Tokenizer

TINY_CLIP = {
    "text_config": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "vocab_size": 99,
        "bos_token_id": 97,
        "eos_token_id": 98,
        "pad_token_id": 98,
    },
    "vision_config": {
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "image_size": 32,
        "patch_size": 8,
    },
    "projection_dim": 24,
}
DTYPES = {"fp32": (jnp.float32, torch.float32, 1e-4), "fp64": (jnp.float64, torch.float64, 1e-8)}


def make_peer(config=TINY_CLIP, **text):
    torch.manual_seed(0)
    config = json.loads(json.dumps(config))
    config["text_config"] |= text
    peer = CLIPModel(CLIPConfig(**config)).eval().requires_grad_(False)
    peer.logit_scale.fill_(1.7)
    return peer


def compare(peer, kind):
    """Pictures' and texts' places in the space, and the logits of each pair."""
    dtype, peer_dtype, tolerance = DTYPES[kind]
    config = peer.config
    with jax.enable_x64(kind == "fp64"):
        peer = peer.to(peer_dtype)
        module = models.from_config(config.to_dict(), dtype)
        state = {name: value.numpy() for name, value in peer.state_dict().items() if "position_ids" not in name}
        params = jax.tree.map(jnp.asarray, convert.from_torch(module, state))
        rng = np.random.default_rng(0)
        size, vocabulary = config.vision_config.image_size, config.text_config.vocab_size
        x = rng.normal(size=(3, size, size, 3))
        ids = rng.integers(0, vocabulary - 2, (2, 77))
        ids[0, 5:], ids[1, 76] = vocabulary - 1, vocabulary - 1
        pictures, texts = torch.tensor(x, dtype=peer_dtype).permute(0, 3, 1, 2), torch.tensor(ids)
        expected = peer(input_ids=texts, pixel_values=pictures)
        run = lambda method, *inputs: jax.jit(  # noqa: E731
            lambda p, *inputs: module.apply({"params": p}, *inputs, method=method)
        )(params, *inputs)
        x, ids = jnp.asarray(x, dtype), jnp.asarray(ids)
        found = {"image_embeds": run("image", x), "text_embeds": run("text", ids)}
        for name, value in found.items():
            unit = value / np.linalg.norm(value, axis=1, keepdims=True)
            np.testing.assert_allclose(unit, expected[name].numpy(), rtol=0, atol=tolerance)
        lengths = peer.vision_model(pictures).pooler_output @ peer.visual_projection.weight.T
        np.testing.assert_allclose(found["image_embeds"], lengths.numpy(), rtol=0, atol=tolerance * 10)
        logits = run(None, x, ids)
        np.testing.assert_allclose(logits, expected.logits_per_image.numpy(), rtol=0, atol=tolerance * 10)
    return module


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_both_towers_equal_transformers(activation, kind):
    config = json.loads(json.dumps(TINY_CLIP))
    config["vision_config"]["hidden_act"] = config["text_config"]["hidden_act"] = activation
    compare(make_peer(config), kind)


def test_old_configs_read_a_text_at_its_largest_id():
    assert compare(make_peer(eos_token_id=2), "fp32").eos_id == 98


def test_a_folder_comes_back_byte_for_byte(tmp_path):
    peer = make_peer()
    peer.save_pretrained(tmp_path / "clip")
    found = convert.read(tmp_path / "clip")
    assert list(found.parts) == ["clip"] and found.mapped == found.total == len(peer.state_dict())
    convert.write(found, tmp_path / "back")
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("clip", "back"))
    assert sorted(left) == sorted(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("clip", "back")]
    assert configs[0] == configs[1]
    module, params = jdiff.load(tmp_path / "clip")
    # jdiff's own file says what it holds, and makes a folder that transformers opens
    convert.write(found, tmp_path / "clip.safetensors", "safetensors")
    again = convert.read(tmp_path / "clip.safetensors")
    assert again.parts["clip"].module == module
    convert.write(again, tmp_path / "again", "diffusers")
    theirs = CLIPModel.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in peer.state_dict().items())
    with pytest.raises(ValueError, match="CompVis' format has no place for a CLIP"):
        convert.write(found, tmp_path / "clip.ckpt", "compvis")
    assert tree.count(params) == sum(value.numel() for value in peer.parameters())


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("vision_config", {"num_channels": 4}, "num_channels=4 is not supported"),
        ("vision_config", {"patch_size": 7}, "image_size=32 is not a multiple of patch_size=7"),
        ("text_config", {"hidden_act": "silu"}, "activation='silu' is unknown"),
        ("text_config", {"rope_theta": 10.0}, "rope_theta"),
    ],
)
def test_a_config_of_something_else_is_refused(part, change, named):
    config = make_peer().config.to_dict()
    with pytest.raises(ValueError, match=named):
        models.from_config({**config, part: {**config[part], **change}})


@pytest.mark.parametrize(("name", "count"), [("CLIP-ViT-B/32", 151_277_313), ("CLIP-ViT-L/14", 427_616_513)])
def test_parameter_counts(name, count):
    module = models.create(name)
    assert tree.count(jax.eval_shape(lambda key: module.init(key, *module.dummy_inputs()), jax.random.key(0))) == count


@pytest.mark.slow
def test_full_size_equals_transformers():
    assert compare(make_peer({"text_config": {}, "vision_config": {}}), "fp32") == models.create("CLIP-ViT-B/32")


@pytest.mark.slow
def test_full_size_large_equals_transformers():
    config = {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
        "projection_dim": 768,
    }
    config["vision_config"] |= {"num_attention_heads": 16, "patch_size": 14}
    assert compare(make_peer(config), "fp32") == models.create("CLIP-ViT-L/14")


# Scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLIP as transformers saves it, with a tokenizer that was learnt from captions."""
    path = tmp_path_factory.mktemp("clip") / "CLIP"
    tokenizer = make_clip(path)
    return path, tokenizer


@pytest.mark.parametrize("shape", [(32, 32), (57, 41), (24, 20), (100, 256), (16, 64)])
def test_pictures_are_prepared_as_transformers_does(shape):
    image = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    image[1] = np.kron(image[1, ::4, ::4], np.ones((4, 4, 1), np.uint8))[: shape[0], : shape[1]]  # overshoots at edges
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(list(map(Image.fromarray, image)), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    found = np.asarray(prepared(image, 32))
    step = 1 / 255 / 0.26  # PIL's sums are of whole numbers, so one that lies half way may go to the other byte
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.05 * step)
    assert (np.abs(found - expected) > 1e-5).mean() < 1e-3


def test_scores_by_text_equal_transformers(folder, commands, tmp_path):
    path, tokenizer = folder
    network = open_network(path)
    rng = np.random.default_rng(0)
    pictures, prompts = rng.integers(0, 256, (40, 20, 24, 3), dtype=np.uint8), captions()[:40]
    samples = network.features([pictures[:25], pictures[25:]], prompts=prompts)
    peer = CLIPModel.from_pretrained(path)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})(
        list(map(Image.fromarray, pictures)), return_tensors="pt"
    )
    words = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        both = peer(**words, **pixels)
    cosine = (both.image_embeds * both.text_embeds).sum(1).double().numpy()
    score = scores(samples, None, ("clip",), resamples=200)["clip"]
    assert score.value == pytest.approx(100 * np.maximum(cosine, 0).mean(), abs=0.02)  # of a byte here and there
    deviation = 100 * np.maximum(cosine, 0).std(ddof=1) / 40**0.5
    assert score.high - score.value == pytest.approx(1.96 * deviation, rel=0.2)
    # the tool, of an .npz and of a folder with captions; and CLIP's space for other metrics
    np.savez(tmp_path / "samples.npz", arr_0=pictures, prompt=np.asarray(prompts))
    np.savez(tmp_path / "others.npz", arr_0=rng.integers(0, 256, (30, 20, 24, 3), dtype=np.uint8))
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i:02}.png")
        (tmp_path / "pictures" / f"{i:02}.txt").write_text(prompts[i])
    common = ("--network", path, "--resamples", 4, "--json", tmp_path / "scores.jsonl")
    runs = (
        ("samples.npz", "--metrics", "clip,fid,kid,precision", "--reference", tmp_path / "others.npz"),
        ("pictures", "--metrics", "clip", "--image-size", 20),
    )
    for name, *options in runs:
        done = commands.run("tools/evaluate.py", tmp_path / name, *options, *common)
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert lines[0]["clip"][0] == pytest.approx(score.value, abs=1e-6) and lines[0]["kid"][1] < lines[0]["kid"][0]
    assert lines[1]["clip"][0] != lines[0]["clip"][0] and lines[1]["network"].startswith("CLIP ")


def test_a_mistake_is_one_line(folder, tmp_path):
    path, _ = folder
    network = open_network(path)
    image = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "bare.npz", arr_0=image)
    (tmp_path / "many").mkdir()
    Image.fromarray(image[0]).save(tmp_path / "many" / "a.png")
    (tmp_path / "many" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["a fox", "a red fox"]}\n')
    bare, many = (open_pictures(str(tmp_path / name), 8, captions=True) for name in ("bare.npz", "many"))
    other = shutil.copytree(path, tmp_path / "other")
    (other / "preprocessor_config.json").write_text(json.dumps({"do_resize": True, "size": {"shortest_edge": 224}}))
    foreign = shutil.copytree(path, tmp_path / "foreign")
    (foreign / "tokenizer.json").unlink()
    Tokenizer.train(["a red fox"], 600).save(foreign)
    cases = (
        (r"CLIP reads 75 tokens, and this prompt has 80, so it has no score", lambda: network.texts(["fox " * 80])),
        (r"there are 1 prompts for 2 pictures", lambda: network.features([image], prompts=["a"])),
        (r"is takes the logits of classes, which CLIP", lambda: check_metrics(("is",), None, network=network)),
        (r"clip takes texts beside pictures", lambda: scores(network.features([image]), None, ("clip",))),
        (r"bare\.npz has no `prompt` for each picture", lambda: prompts_of("bare.npz", bare)),
        (r"picture 0 has 2 captions, and a score is of one", lambda: prompts_of("many", many)),
        (r"many has no texts", lambda: prompts_of("many", open_pictures(str(tmp_path / "many"), 8))),
        (r"size=\{'shortest_edge': 224\} is not supported, only \{'shortest_edge': 32\}", lambda: open_network(other)),
        (r"the tokenizer ends texts with \d+ at 77, CLIP with \d+ at 77", lambda: open_network(foreign)),
    )
    for said, call in cases:
        with pytest.raises(ValueError, match=said) as error:
            call()
        assert "\n" not in str(error.value)
