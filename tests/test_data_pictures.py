"""Every kind of picture file becomes the RGB it shows; the crop is ADM's; the sources list what they should."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
from PIL import Image

from jdiff import data
from jdiff.data import images

RAMP = np.tile(np.linspace(0, 255, 32).round().astype(np.uint8), (32, 1))


def encoded(picture, kind="PNG", **options):
    """A picture file's bytes."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def crop_of_adm(image, size):
    """`center_crop_arr`, written down anew from facebookresearch/DiT train.py."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[y : y + size, x : x + size]


@pytest.mark.parametrize("shape", [(64, 64), (63, 200), (500, 37), (31, 32), (257, 129), (16, 16), (5, 9), (331, 500)])
@pytest.mark.parametrize("size", [16, 32])
def test_the_crop_equals_adms_bit_by_bit(shape, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for file in (encoded(Image.fromarray(pixels)), encoded(Image.fromarray(pixels), "JPEG")):
        expected = crop_of_adm(Image.open(io.BytesIO(file)).convert("RGB"), size)
        assert np.array_equal(images.decode(file, size), expected)


def odd_pictures():
    """(name, file's bytes, the RGB that is seen, tolerance)."""
    grey, ramp = Image.fromarray(RAMP), np.repeat(RAMP[..., None], 3, -1)
    wide = (RAMP.astype(np.uint16) * 257).astype(np.uint16)
    over_white = 255 - ramp  # black, more opaque to the right
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[..., 3] = RAMP
    palette = Image.fromarray((RAMP > 127).astype(np.uint8), "P")
    palette.putpalette([200, 10, 10, 10, 10, 200])
    two = np.where((RAMP > 127)[..., None], [10, 10, 200], [200, 10, 10])
    hole = np.where((RAMP > 127)[..., None], [10, 10, 200], [255, 255, 255])
    rotated = Image.Exif()
    rotated[0x0112] = 6
    yield "grey", encoded(grey), ramp, 0
    yield "16-bit grey PNG", encoded(Image.fromarray(wide)), ramp, 0
    yield "16-bit grey TIFF", encoded(Image.fromarray(wide), "TIFF"), ramp, 0
    yield "1-bit", encoded(grey.point(lambda v: 255 * (v > 127), "1")), 255 * (ramp > 127), 0
    yield "palette", encoded(palette), two, 0
    yield "palette with a hole", encoded(palette, transparency=0), hole, 0
    yield "RGBA", encoded(Image.fromarray(rgba)), over_white, 1
    yield "LA", encoded(Image.fromarray(rgba[..., 2:])), over_white, 1
    yield "RGB with a hole", encoded(palette.convert("RGB"), transparency=(200, 10, 10)), hole, 0
    yield "CMYK", encoded(Image.fromarray(ramp).convert("CMYK"), "JPEG", quality=100), ramp, 4
    yield "GIF, animated", encoded(grey, "GIF", save_all=True, append_images=[grey.rotate(180)]), ramp, 0
    yield "APNG", encoded(grey, save_all=True, append_images=[grey.rotate(180)], duration=9), ramp, 0
    yield (
        "WebP, animated",
        encoded(grey, "WEBP", save_all=True, append_images=[grey.rotate(180)], lossless=True),
        ramp,
        1,
    )
    yield "turned by EXIF", encoded(grey, exif=rotated), ramp.transpose(1, 0, 2), 0


@pytest.mark.parametrize("name", [name for name, *_ in odd_pictures()])
def test_odd_pictures_are_seen_as_they_look(name):
    file, expected, tolerance = next(rest for first, *rest in odd_pictures() if first == name)
    got = images.decode(file, 32)
    assert got.shape == (32, 32, 3) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).max() <= tolerance


def test_no_odd_picture_costs_more_than_itself(tmp_path):
    """The acceptance's folder: each odd file among good ones, half of them unreadable."""
    for name, file, *_ in odd_pictures():
        (tmp_path / f"{name}.png").write_bytes(file)
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    bad = {
        "bomb": bomb,
        "truncated": encoded(Image.fromarray(RAMP))[:-30],
        "cut": encoded(Image.fromarray(RAMP), "JPEG")[:300],
        "empty": b"",
        "text": b"<html>404</html>",
        "sliver": encoded(Image.new("L", (1, 60_000))),
    }
    for name, file in bad.items():
        (tmp_path / f"{name}.png").write_bytes(file)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    source = data.open_source("imagefolder", path=str(tmp_path), image_size=1024)
    reasons = {}
    for i in range(len(source)):
        try:
            source.read(i, False, np.random.default_rng(0))
        except data.BrokenRecord as error:
            reasons[source.file(i).stem] = error.reason
    assert set(reasons) in ({*bad, "gone"}, set(bad))
    assert "pixels" in reasons["bomb"] and "pixels" in reasons["sliver"]
    assert not any("\n" in reason for reason in reasons.values())


def test_a_large_photograph_warns_nobody():
    """Between PIL's warning (89 million pixels) and the limit, where a warning a step would fill the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            images.decode(encoded(Image.new("1", (10_000, 10_000))), 8)
        except (OSError, ValueError, Image.DecompressionBombWarning) as error:
            pytest.fail(f"{type(error).__name__}: {error}")


def test_a_listing_of_many_files_is_small_sorted_and_pickles(tmp_path):
    for c in range(4):
        (tmp_path / f"n{c}" / "deep").mkdir(parents=True)
        for i in range(5_000):
            os.close(os.open(tmp_path / f"n{c}" / ("deep" if i % 2 else "") / f"picture_{i:06}.JPEG", os.O_CREAT))
    (tmp_path / "n0" / "notes.txt").write_text("x")
    (tmp_path / "n0" / ".hidden.png").write_text("x")
    (tmp_path / "empty").mkdir()
    source = data.open_source("imagefolder", path=str(tmp_path), image_size=16)
    assert len(source) == 20_000 and source.class_names == ["n0", "n1", "n2", "n3"]
    assert len(pickle.dumps(source)) < 20_000 * 64
    copy = pickle.loads(pickle.dumps(source))
    assert all(copy.file(i) == source.file(i) and source.file(i).exists() for i in range(0, 20_000, 999))
    again = data.open_source("imagefolder", path=str(tmp_path), image_size=16)
    assert again.fingerprint == source.fingerprint
    (tmp_path / "n1" / "more.png").write_text("")
    assert data.open_source("imagefolder", path=str(tmp_path), image_size=16).fingerprint != source.fingerprint


def test_a_folder_that_links_to_its_parent_ends(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encoded(Image.fromarray(RAMP)))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    try:
        source = data.open_source("imagefolder", path=str(tmp_path), image_size=16)
    except data.DataError as error:
        assert "\n" not in str(error)
    else:
        assert len(source) == 1


@pytest.fixture(scope="module")
def emoji_cache(tmp_path_factory):
    """A cache folder with OpenMoji at 8 pixels in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        data.open_source("openmoji", image_size=8)
        yield os.environ["JDIFF_CACHE"]


def open_emoji(_=None):
    """Opens, and tells what it holds (in a process of its own, too)."""
    source = data.open_source("openmoji", image_size=8)
    rng = np.random.default_rng(0)
    return [source.read(i, False, rng)["image"].tobytes() for i in range(len(source))]


def test_openmoji_is_what_it_is_said_to_be(emoji_cache):
    source = data.open_source("openmoji", image_size=8)
    records = [source.read(i, False, np.random.default_rng(0)) for i in range(len(source))]
    counts = np.bincount([r["label"] for r in records])
    assert len(source) == 1903 and source.shape == (8, 8, 3) and source.class_names == sorted(source.class_names)
    assert counts.tolist() == [85, 153, 5, 269, 135, 262, 385, 168, 223, 218]
    assert all(r["caption"] and r["caption"] == r["caption"].lower() for r in records)
    by_name = {r["caption"]: r["label"] for r in records}
    assert source.class_names[by_name["grinning face"]] == "Smileys & Emotion"
    assert source.class_names[by_name["red apple"]] == "Food & Drink"
    pictures = np.stack([r["image"] for r in records])
    assert pictures.dtype == np.uint8 and 150 < pictures.mean() < 250 and np.ptp(pictures, axis=(1, 2, 3)).min() > 0
    assert not [p for p in os.listdir(os.path.join(emoji_cache, "openmoji")) if p.endswith(".tmp")]
    assert len(pickle.dumps(source)) < 300_000


@pytest.mark.parametrize("damage", ["truncated", "empty", "zeros", "garbage", "a byte"])
def test_a_damaged_cache_is_drawn_anew(emoji_cache, damage):
    whole = open_emoji()
    folder = os.path.join(emoji_cache, "openmoji")
    path = os.path.join(folder, os.listdir(folder)[0])
    with open(path, "rb") as file:
        content = bytearray(file.read())
    if damage == "a byte":
        content[len(content) // 2] ^= 0xFF
    damaged = {
        "truncated": content[:-1000],
        "empty": b"",
        "zeros": bytes(len(content)),
        "garbage": b"x" * 999,
        "a byte": content,
    }[damage]
    os.unlink(path)  # a new file: the old one is mapped by sources that are open
    with open(path, "wb") as file:
        file.write(damaged)
    try:
        assert open_emoji() == whole
    finally:
        os.unlink(path)


def test_two_processes_may_draw_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JDIFF_CACHE", str(tmp_path))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(open_emoji, range(2), chunksize=1)
    assert first == second == open_emoji()
    assert len(os.listdir(tmp_path / "openmoji")) == 1


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("JDIFF_CACHE", str(tmp_path / "file"))
    with pytest.raises(data.DataError, match="JDIFF_CACHE"):
        data.open_source("openmoji", image_size=8)


def make_tfds(folder, form="array_record"):
    """A built data set of six grey pictures, as TFDS lays it out; needs no TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    writing = pytest.importorskip("array_record.python.array_record_module")
    from tensorflow_datasets.core import example_serializer

    picture, label = tfds.features.Image(shape=(None, None, 1)), tfds.features.ClassLabel(names=["cat", "dog"])
    features = tfds.features.FeaturesDict({"image": picture, "label": label})
    features.save_config(str(folder))
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    writer = writing.ArrayRecordWriter(str(folder / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for i in range(6):
        file = io.BytesIO(encoded(Image.fromarray(np.full((20, 30), i * 40, np.uint8))))
        writer.write(serializer.serialize_example(features.encode_example({"image": file, "label": i % 2})))
    writer.close()
    layout = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"name": "train", "shardLengths": ["6"], "numBytes": "100", "filepathTemplate": layout}
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": form, "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_tfds_is_read_without_tensorflow(tmp_path):
    source = data.open_source("tfds", path=str(make_tfds(tmp_path)), image_size=16)
    assert (len(source), source.class_names, source.num_classes) == (6, ["cat", "dog"], 2)
    for i, opened in enumerate([source, pickle.loads(pickle.dumps(source))] * 3):
        record = opened.read(i, False, np.random.default_rng(0))
        assert np.array_equal(record["image"], np.full((16, 16, 3), i * 40)) and record["label"] == i % 2
    with data.batches(source, batch_size=4, seed=0, workers=1) as reader:
        assert next(reader)["image"].shape == (4, 16, 16, 3)


def test_tfds_of_another_form_is_one_line(tmp_path):
    make_tfds(tmp_path, form="tfrecord")
    with pytest.raises(data.DataError) as caught:
        data.open_source("tfds", path=str(tmp_path), image_size=16)
    assert "array_record" in str(caught.value) and "\n" not in str(caught.value)


def test_tfds_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    with pytest.raises(data.DataError, match=r"pip install 'jax-jdiff\[tfds\]'"):
        data.open_source("tfds", path="mnist", image_size=16)


def test_a_png_that_claims_gigabytes_takes_none(tmp_path):
    """Of the length that a chunk states PIL makes room for as much, where a file on disk is its source."""
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT")
    data[at - 4 : at] = (2**32 - 2**20).to_bytes(4, "big")
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError, OSError, SyntaxError):
            images.decode(str(path), 8)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
