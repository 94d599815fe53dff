"""Buckets: every batch has one shape, every record comes once an epoch, and the order is a function of (seed, step, row)."""

import io
import json
import logging

import numpy as np
import pytest
from PIL import Image

from jdiff import data
from jdiff.data import buckets, images
from jdiff.data.order import ByBucket

SIZES = buckets.make_sizes(32, step=8, max_ratio=2.0)
SHAPES = [(40, 40), (64, 40), (33, 64), (20, 90), (90, 20), (10, 12)]
"""Pictures' heights and widths."""


def make(folder, count=23, broken=()):
    """Pictures whose grey is their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = SHAPES[i * i % len(SHAPES)]
        Image.new("L", (width, height), i).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"picture {i}")
        if i in broken:
            whole = (folder / f"{i:03}.png").read_bytes()
            (folder / f"{i:03}.png").write_bytes(whole[:45])  # the header is whole
    return folder


def open_pictures(folder, name="captions", **options):
    return data.open_source(name, path=str(folder), image_size=32, buckets=SIZES, **options)


def take(source, steps, **options):
    """The first batches."""
    options = {"batch_size": 8, "seed": 3, "max_bad_rate": 1.0, **options}
    with data.batches(source, **options) as reader:
        return [next(reader) for _ in range(steps)]


@pytest.mark.parametrize(("image_size", "step"), [(512, 64), (768, 64), (512, 8), (64, 8), (64, 64), (192, 64)])
@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0, 4.0])
def test_sizes_are_multiples_within_the_area_both_ways_round(image_size, step, ratio):
    sizes = buckets.make_sizes(image_size, step, ratio)
    assert (image_size, image_size) in sizes and list(sizes) == sorted(set(sizes))
    for height, width in sizes:
        assert height % step == width % step == 0 and height * width <= image_size**2
        assert max(height, width) <= ratio * min(height, width) and (width, height) in sizes
        assert (max(height, width) + step) * min(height, width) > image_size**2, "a longer side would have done"
    if ratio == 1.0:
        assert sizes == ((image_size, image_size),)


def test_the_sizes_of_stable_diffusion():
    found = [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert list(buckets.make_sizes(512)) == found


@pytest.mark.parametrize(
    ("size", "step", "ratio"), [(500, 64, 2), (32, 64, 2), (64, 0, 2), (64, 8, 0.5), (64, 8, np.nan)]
)
def test_impossible_sizes_are_one_line(size, step, ratio):
    with pytest.raises(data.DataError) as caught:
        buckets.make_sizes(size, step, ratio)
    assert "\n" not in str(caught.value)


def test_each_picture_goes_to_the_nearest_ratio_either_way_round():
    rng = np.random.default_rng(0)
    sizes = buckets.make_sizes(512)
    shapes = rng.integers(1, 4000, (500, 2))
    for shape, found in zip(shapes, buckets.nearest(sizes, shapes), strict=True):
        ratios = {size: abs(np.log(size[1] / size[0] * shape[0] / shape[1])) for size in sizes}
        assert ratios[sizes[found]] == min(ratios.values())
    turned = buckets.nearest(sizes, shapes[:, ::-1])
    assert all(sizes[a] == sizes[b][::-1] for a, b in zip(buckets.nearest(sizes, shapes), turned, strict=True))


def test_the_header_gives_the_size_that_is_seen():
    for kind, options in (("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("TIFF", {})):
        for tag in (None, *range(1, 9)):
            exif = Image.Exif()
            if tag:
                exif[0x0112] = tag
            file = io.BytesIO()
            Image.new("RGB", (30, 20)).save(file, kind, **options, **({"exif": exif} if tag else {}))
            shown = (30, 20) if tag in (5, 6, 7, 8) else (20, 30)
            assert images.header_size(file.getvalue()) == shown, (kind, tag)
            assert images.decode(file.getvalue(), shown).shape == (*shown, 3)


def test_a_header_is_read_without_the_picture():
    file = io.BytesIO()
    Image.new("RGB", (3000, 2000)).save(file, "PNG")
    assert images.header_size(file.getvalue()[:100]) == (2000, 3000)


@pytest.mark.parametrize("shape", [(40, 40), (100, 40), (7, 9), (9, 200), (64, 129), (32, 16)])
@pytest.mark.parametrize("size", [(16, 32), (32, 16), (24, 24)])
def test_a_crop_covers_and_is_central(shape, size):
    """A picture of two ramps keeps its middle in the middle, at one scale both ways, and fills the whole size."""
    y, x = (np.arange(n) - (n - 1) / 2 for n in shape)
    ramps = np.stack(np.broadcast_arrays(y[:, None], x[None]), -1)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    pixels = np.clip(np.round(128 + np.pad(ramps, ((0, 0), (0, 0), (0, 1)))), 0, 255).astype(np.uint8)
    got = np.asarray(images.crop(Image.fromarray(pixels), *size)).astype(float)
    assert got.shape == (*size, 3)
    expected = [128 + (np.arange(n) - (n - 1) / 2) / scale for n in size]
    inner = (slice(2, -2), slice(2, -2))
    tolerance = 2.5 + 1 / scale  # rounding of sides and of the cut, and of the halvings of odd sides
    assert np.abs(got[inner][..., 0] - expected[0][2:-2, None]).max() < tolerance
    assert np.abs(got[inner][..., 1] - expected[1][None, 2:-2]).max() < tolerance


def test_a_random_crop_cuts_anywhere_the_same_for_the_same_generator():
    picture = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    lefts = [int(np.asarray(images.crop(picture, 16, 16, np.random.default_rng(i)))[0, 0, 0]) for i in range(400)]
    assert set(lefts) == set(range(49))
    assert lefts[7] == np.asarray(images.crop(picture, 16, 16, np.random.default_rng(7)))[0, 0, 0]


def test_every_batch_is_one_bucket_of_the_nearest_ratio(tmp_path):
    source = open_pictures(make(tmp_path))
    shapes = set()
    for batch in take(source, 30):
        height, width = batch["image"].shape[1:3]
        shapes.add((height, width))
        assert batch["image"].shape == (8, height, width, 3) and (height, width) in SIZES
        for index, picture in zip(batch["index"], batch["image"], strict=True):
            assert np.all(picture == index)
            shape = SHAPES[index * index % len(SHAPES)]
            assert (height, width) == SIZES[buckets.nearest(SIZES, np.array([shape]))[0]]
    assert len(shapes) > 2


@pytest.mark.parametrize("batch_size", [1, 4, 5, 8, 64])
@pytest.mark.parametrize("counts", [(23,), (1, 40), (7, 5, 11), (64, 64), (3, 3, 3, 3)])
def test_an_epoch_holds_every_record_and_repeats_as_few_as_it_can(batch_size, counts):
    of = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)) * 2, counts)).astype(np.int16)
    order = ByBucket(of, batch_size, seed=1)
    steps = sum(-(-n // batch_size) for n in counts)
    assert order.turns == steps
    seen = []
    for epoch in range(3):
        rows = np.array(
            [
                [next(order.candidates(s, r)) for r in range(batch_size)]
                for s in range(epoch * steps, (epoch + 1) * steps)
            ]
        )
        assert all(len(set(of[batch])) == 1 for batch in rows)
        times = np.bincount(rows.ravel(), minlength=len(of))
        for bucket, n in zip(np.unique(of), counts, strict=True):
            own = times[of == bucket]
            assert own.sum() == -(-n // batch_size) * batch_size and own.min() >= 1 and own.max() - own.min() <= 1
        seen.append(rows.tobytes())
    assert len(set(seen)) == (3 if len(of) > 1 and steps * batch_size > 4 else len(set(seen)))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 5, 13])
def test_rows_do_not_depend_on_processes_or_where_a_run_resumes(tmp_path, count, start):
    source = open_pictures(make(tmp_path, broken=(3, 11)))
    whole = take(source, 18)
    for index in range(count):
        rows = range(index * 8 // count, (index + 1) * 8 // count)
        part = take(source, 18 - start, start_step=start, rows=rows)
        for a, b in zip(part, whole[start:], strict=True):
            assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k][rows]) for k in a)


@pytest.mark.parametrize("name", ["captions", "imagefolder"])
def test_workers_give_the_same(tmp_path, name):
    source = open_pictures(make(tmp_path), name)
    for a, b in zip(take(source, 6), take(source, 6, workers=2), strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)


def test_a_broken_record_is_replaced_from_its_own_bucket(tmp_path):
    source, log = open_pictures(make(tmp_path / "d", broken=(3, 11))), tmp_path / "bad.jsonl"
    got = take(source, 24, bad_log=log)
    assert {len(set(source.buckets.of[batch["index"]])) for batch in got} == {1}
    assert set(np.concatenate([b["index"] for b in got]).tolist()) == set(range(23)) - {3, 11}
    assert len(log.read_text().splitlines()) == 2


def test_a_bucket_of_broken_records_alone_is_passed_over(tmp_path):
    of = open_pictures(make(tmp_path)).buckets.of
    gone = set(np.flatnonzero(of == of[2]).tolist())
    source = open_pictures(make(tmp_path, broken=gone))
    assert np.array_equal(source.buckets.of, of) and 3 < len(gone) < 23
    for count in (1, 2):
        parts = [take(source, 24, rows=range(i * 8 // count, (i + 1) * 8 // count)) for i in range(count)]
        for step in zip(*parts, strict=True):
            index = np.concatenate([part["index"] for part in step])
            assert not gone & set(index.tolist()) and len(set(source.buckets.of[index])) == 1


def test_a_picture_without_a_readable_header_costs_itself_alone(tmp_path):
    make(tmp_path)
    (tmp_path / "005.png").write_bytes(b"nothing")
    source = open_pictures(tmp_path)
    assert source.buckets.of[5] == np.bincount(source.buckets.of).argmax()
    assert all(5 not in batch["index"] for batch in take(source, 20))
    for file in tmp_path.glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(data.DataError, match="in a row cannot be read"):
        take(open_pictures(tmp_path), 1)


def test_the_table_is_logged_and_adds_up(tmp_path, caplog):
    source = open_pictures(make(tmp_path))
    with caplog.at_level(logging.INFO):
        take(source, 1)
    (table,) = [r.getMessage() for r in caplog.records if "bucket" in r.getMessage()]
    rows = [line.replace(",", "").split() for line in table.splitlines() if " x " in line and "bucket" not in line]
    assert [(int(row[0]), int(row[2])) for row in rows] == list(SIZES)
    numbers = np.array([row[3:] for row in rows], int)
    assert np.array_equal(numbers[:, 0], np.bincount(source.buckets.of, minlength=len(SIZES)))
    assert np.array_equal(numbers[:, 1] * 8, numbers[:, 0] + numbers[:, 2]) and numbers[:, 0].sum() == 23
    share = numbers[:, 2].sum() / (numbers[:, 1].sum() * 8)
    assert f"{share:.1%} of an epoch's rows" in table


def test_the_fingerprint_follows_the_buckets(tmp_path):
    make(tmp_path)
    plain = data.open_source("captions", path=str(tmp_path), image_size=32)
    first = open_pictures(tmp_path)
    assert first.fingerprint == open_pictures(tmp_path).fingerprint != plain.fingerprint
    Image.new("L", (90, 20)).save(tmp_path / "000.png")
    assert open_pictures(tmp_path).fingerprint != first.fingerprint


def test_a_random_crop_depends_on_seed_and_step_alone(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (48, 90, 3), np.uint8)
    for i in range(5):
        Image.fromarray(np.roll(noise, i)).save(tmp_path / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": ["a", "b"]}) for i in range(5)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    source = data.open_source("captions", path=str(tmp_path), image_size=32, random_crop=True)
    a, b = take(source, 6, flip=False), take(source, 6, flip=False, workers=1)
    assert all(np.array_equal(x["image"], y["image"]) for x, y in zip(a, b, strict=True))
    crops = {}
    for batch in a:
        for index, picture in zip(batch["index"], batch["image"], strict=True):
            crops.setdefault(int(index), set()).add(picture.tobytes())
    assert all(len(found) > 3 for found in crops.values())
