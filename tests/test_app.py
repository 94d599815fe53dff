"""The app behind its page: jobs told as they go on, uploads checked, limits, one job at a time."""

import itertools
import threading

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from test_class_pipeline import make_pipe
from tiny_sd import make_folder

import jdiff
from jdiff import sharding
from jdiff.app.stream import stream
from jdiff.app.studio import Limits, Made, Studio
from jdiff.app.uploads import check_loras, fitted, keep_outside, open_picture
from jdiff.loading import Quantized

QUICK = {"width": 16, "height": 16, "steps": 3, "scheduler": "ddim"}


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    one = sharding.make_mesh(devices=jax.devices()[:1])
    return Studio(jdiff.pipeline(make_folder(tmp_path_factory.mktemp("sd")), mesh=one), "tiny")


def make_lora(path, value=1.0):
    """kohya's names, for one layer of the tiny UNet."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v"
    rng = np.random.default_rng(0)
    arrays = {"lora_down.weight": rng.normal(size=(2, 32)), "lora_up.weight": value * rng.normal(size=(32, 2))}
    save_file(
        {f"{name}.{k}": v.astype(np.float32) for k, v in arrays.items()}
        | {f"{name}.alpha": np.full((), 2, np.float32)},
        path,
    )
    return path


def made(job):
    *_, last = job
    assert isinstance(last, Made)
    return last


def arrays(job):
    return np.stack([np.asarray(picture) for picture in made(job).pictures])


def test_a_stream_yields_what_is_told_and_returns_or_raises():
    asked = threading.Semaphore(0)

    def call(tell):
        for i in range(3):
            tell(i)
            asked.acquire()
        return "done"

    found = stream(call)
    for i in range(3):
        assert next(found) == i
        asked.release()
    with pytest.raises(StopIteration) as end:
        next(found)
    assert end.value.value == "done"
    with pytest.raises(ZeroDivisionError):
        next(stream(lambda tell: 1 / 0))


def test_closing_a_stream_ends_its_call():
    ended = threading.Event()

    def call(tell):
        try:
            while True:
                tell(1)
        finally:
            ended.set()

    found = stream(call)
    next(found)
    found.close()
    assert ended.is_set()


def test_what_is_no_picture_is_refused(tmp_path):
    good = tmp_path / "good.png"
    Image.new("RGBA", (5, 4), (255, 0, 0, 0)).save(good)
    assert open_picture(good).mode == "RGB" and open_picture(good).getpixel((0, 0)) == (255, 255, 255)
    for name, content in (("text.png", b"no picture"), ("half.png", good.read_bytes()[:40]), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as PNG, JPEG, WEBP"):
            open_picture(tmp_path / name)
    Image.new("RGB", (5, 4)).save(tmp_path / "other.gif")
    with pytest.raises(ValueError, match="cannot be read as"):
        open_picture(tmp_path / "other.gif")
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="9000 x 9000 pixels, above"):
        open_picture(tmp_path / "large.png")
    with pytest.raises(ValueError, match="there is no picture"):
        open_picture(None)


def test_only_safetensors_are_loras(tmp_path):
    file = make_lora(tmp_path / "a.safetensors")
    assert check_loras([file], "") == [(file, 1.0)] and check_loras([file, file], "0.5, -1")[1] == (file, -1.0)
    (tmp_path / "pickle.safetensors").write_bytes(b"PK\x03\x04" + b"0" * 100)
    file.rename(tmp_path / "a.bin")
    for name in ("pickle.safetensors", "a.bin"):
        with pytest.raises(ValueError, match=f"{name} is no safetensors file"):
            check_loras([tmp_path / name], "")
    file = make_lora(tmp_path / "a.safetensors")
    for scales, said in (("1, 2", "2 given for 1 file"), ("much", "'much' are not numbers")):
        with pytest.raises(ValueError, match=said):
            check_loras([file], scales)


@pytest.mark.parametrize(
    ("size", "width", "height", "expected"),
    [((4000, 3000), 512, 512, (592, 440)), ((64, 64), 512, 512, (512, 512)), ((3000, 10), 64, 64, (1112, 8))],
)
def test_a_picture_keeps_its_shape(size, width, height, expected):
    assert fitted(size, width, height, 8) == expected


def test_outside_the_mask_nothing_changes_and_deep_inside_all_does():
    original, made = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    pixels, inside = np.asarray(keep_outside(made, original, mask, 2)), np.asarray(mask) > 0
    assert (pixels[~inside] == (255, 0, 0)).all()
    assert (pixels[14:18, 14:18] == (0, 0, 255)).all()
    assert pixels[8, 16, 2] < 128 < pixels[12, 16, 2]  # no seam


@pytest.mark.runs
def test_a_seed_repeats_a_picture_and_a_lora_changes_it(studio, tmp_path):
    first = made(studio.from_prompt("a red fox", seed=3, count=2, **QUICK))
    assert [fact["index"] for fact in first.facts] == [0, 1] and first.facts[0]["run"] == "tiny"
    again = arrays(studio.from_prompt("a red fox", seed=3, count=2, **QUICK))
    np.testing.assert_array_equal(np.stack(first.pictures), again)
    assert (arrays(studio.from_prompt("a red fox", seed=4, **QUICK)) != again[:1]).any()
    loras = [make_lora(tmp_path / "style.safetensors", 20)]
    adapted = made(studio.from_prompt("a red fox", seed=3, loras=loras, scales="0.5", **QUICK))
    assert adapted.facts[0]["lora"] == {"style": 0.5}
    assert (np.asarray(adapted.pictures[0]) != again[0]).any()
    off = arrays(studio.from_prompt("a red fox", seed=3, loras=loras, scales="0", **QUICK))
    np.testing.assert_array_equal(off, again[:1])


def test_a_balanced_copy_takes_no_loras_of_the_original(studio, tmp_path, monkeypatch):
    monkeypatch.setattr(studio.pipe, "quantized", Quantized("w8a8", {}, balanced=True))
    loras = [make_lora(tmp_path / "style.safetensors")]
    with pytest.raises(ValueError, match="do not fit a balanced copy"):
        made(studio.from_prompt("a red fox", loras=loras, **QUICK))


def test_a_picture_to_begin_with_and_a_mask(studio):
    image = Image.effect_mandelbrot((32, 16), (-2, -1, 1, 1), 50).convert("RGB")
    settings = {**QUICK, "strength": 0.7}
    assert arrays(studio.from_prompt("a fox", image=image, **settings)).shape == (1, 12, 22, 3)  # the area of 16 x 16
    mask = Image.new("L", image.size)
    mask.paste(255, (16, 0, 32, 16))
    repainted = arrays(studio.from_prompt("a fox", image=image, mask=mask, **settings))[0]
    small = np.asarray(image.resize((22, 12), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(repainted[:, :11], small[:, :11])
    assert (repainted[:, 11:] != small[:, 11:]).mean() > 0.5
    with pytest.raises(ValueError, match="nothing is painted"):
        studio.from_prompt("a fox", image=image, mask=Image.new("L", image.size), **settings)


def test_previews_come_at_their_cadence_and_progress_at_every_step(studio):
    *told, last = studio.from_prompt("a fox", preview_every=2, **{**QUICK, "steps": 4})
    assert [news.pictures.shape for news in told if news.done == 2] == [(1, 16, 16, 3)]
    assert all(news.total == 4 for news in told) and isinstance(last, Made)


def test_limits_are_told(studio):
    ask = {"prompt": "a fox", **QUICK}
    wrong = (
        ({"steps": 151}, "steps=151 is outside this app's limits of 1..150"),
        ({"width": 2048}, "width=2048 is outside"),
        ({"count": 5}, "count=5 is outside"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a" * 2001}, "the prompt has 2001 characters"),
        ({"image": Image.new("RGB", (2000, 10))}, "width=.* is outside"),
    )
    small = Studio(studio.pipe, "tiny", Limits(side=64))
    for change, said in wrong:
        with pytest.raises(ValueError, match=said):
            (small if "image" in change else studio).from_prompt(**{**ask, **change})
    with pytest.raises(ValueError, match="seed and first_index must lie in"):
        made(studio.from_prompt(**{**ask, "seed": -1}))


def test_two_jobs_at_once_are_done_in_turn_and_a_closed_one_leaves_the_device_free(studio):
    order = []

    def run(name):
        for _ in studio.from_prompt("a fox", **{**QUICK, "steps": 8}):
            order.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {*order} == {*"ab"} and sum(a != b for a, b in itertools.pairwise(order)) == 1
    job = studio.from_prompt("a fox", **{**QUICK, "steps": 8})
    next(job)
    job.close()
    made(studio.from_prompt("a fox", **QUICK))


def test_classes():
    studio = Studio(make_pipe("gaussian"), "dit")
    found = made(studio.from_labels([2, 0], count=2, steps=3))
    assert [fact["labels"] for fact in found.facts] == [2, 2, 0, 0]
    assert len(found.pictures) == 4 and found.pictures[0].size == (8, 8)
    assert found.facts[0]["sampler"] == "ddim"
    for labels, said in (([], "there is no class"), ([0] * 33, "33 classes are above")):
        with pytest.raises(ValueError, match=said):
            studio.from_labels(labels)


def test_the_page_offers_each_function_by_name(studio):
    gr = pytest.importorskip("gradio")
    from jdiff.app.page import make_page, told

    found = make_page(studio).get_api_info()["named_endpoints"]
    assert set(found) == {"/text_to_image", "/image_to_image", "/inpaint"}
    names = [one["parameter_name"] for one in found["/inpaint"]["parameters"]]
    assert names[:6] == ["prompt", "negative", "edited", "strength", "steps", "guidance"]
    assert "/class_to_image" in make_page(Studio(make_pipe("flow"), "dit")).get_api_info()["named_endpoints"]
    with pytest.raises(gr.Error, match="the prompt is empty"):
        next(told(lambda prompt: studio.from_prompt(prompt, **QUICK))(""))
