"""Captions are found beside pictures, in a listing or in parquet files; what has none is named."""

import csv
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from jdiff import data
from jdiff.data import parquet as parquets

SIZE = 8
WORDS = ["a red fox", "ein Zwölfkämpfer über Öl", "赤いりんご 🍎", "naïve  café,\tdark", 'a "quoted", tag', "fifth"]


def png(value, size=(12, 10)):
    """A grey picture's bytes."""
    file = io.BytesIO()
    Image.new("L", size, value).save(file, "PNG")
    return file.getvalue()


def pictures(folder, count=6, below=""):
    """Grey pictures 000.png, 001.png, … whose grey is 10 times their number."""
    names = [f"{below}{i:03}.png" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(10 * i))
    return names


def jsonl(folder, texts, key="text"):
    names = pictures(folder, len(texts), "sub/")
    rows = [{"file_name": name, "extra": 1, key: text} for name, text in zip(names, texts, strict=True)]
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join([*lines[:1], "", *lines[1:]]), encoding="utf-8")


def sheet(folder, texts, key="text"):
    names = pictures(folder, len(texts))
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["file_name", key], *zip(names, texts, strict=True)])


def sidecars(folder, texts, key="text"):
    for name, text in zip(pictures(folder, len(texts), "a.b/"), texts, strict=True):
        (folder / name).with_suffix(".txt").write_text(f"\n{text} \n", encoding="utf-8")


def table(texts, key="text", plain=False, values=None):
    """An Arrow table as the hub's."""
    pyarrow = pytest.importorskip("pyarrow")
    images = values or [png(10 * i) for i in range(len(texts))]
    column = images if plain else [{"bytes": b, "path": None} for b in images]
    kind = pyarrow.binary() if plain else pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    return pyarrow.table({"id": range(len(texts)), "image": pyarrow.array(column, kind), key: texts})


def write_parquet(file, arrow, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(arrow, file, row_group_size=2, **options)


def parquet(folder, texts, key="text"):
    """Two files, of two and of one row groups."""
    whole = table(texts, key)
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", whole.slice(0, 4))
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", whole.slice(4))


LAYOUTS = {"jsonl": jsonl, "csv": sheet, "sidecars": sidecars, "parquet": parquet}


def open_captions(path, **options):
    return data.open_source("captions", path=str(path), image_size=SIZE, **options)


def refused(path):
    """The one line with which `path` is refused."""
    with pytest.raises(data.DataError) as caught:
        open_captions(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_each_layout_gives_each_picture_its_caption(tmp_path, layout, key):
    if layout == "sidecars" and key != "text":
        pytest.skip("text files have no keys")
    LAYOUTS[layout](tmp_path, WORDS, key)
    source = open_captions(tmp_path)
    assert (len(source), source.num_classes, source.class_names) == (len(WORDS), 1, [tmp_path.name])
    assert source.has_captions and source.shape == (SIZE, SIZE, 3) and source.buckets is None
    for opened in (source, pickle.loads(pickle.dumps(source))):
        for i in reversed(range(len(WORDS))):
            record = opened.read(i, False, np.random.default_rng(0))
            assert record["caption"] == WORDS[i] and opened.texts(i) == [WORDS[i]]
            assert record["label"] == 0 and np.all(record["image"] == 10 * i)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_workers_give_what_a_thread_gives(tmp_path, layout):
    LAYOUTS[layout](tmp_path, WORDS)
    source = open_captions(tmp_path)

    def take(workers):
        with data.batches(source, batch_size=4, seed=0, workers=workers, transform=length) as reader:
            return [next(reader) for _ in range(4)]

    for a, b in zip(take(0), take(1), strict=True):
        assert a.keys() == b.keys() == {"image", "label", "index", "letters"}
        assert all(np.array_equal(a[k], b[k]) for k in a)
        assert [len(WORDS[i]) for i in a["index"]] == a["letters"].tolist()
        assert np.array_equal(a["image"][:, 0, 0, 0], a["index"] * 10)


def length(record, rng):
    return {**record, "letters": len(record["caption"])}


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_one_of_several_captions_is_drawn(tmp_path, layout):
    several = [["one", "two", "three"], ["only"], ["up", "down"], ["a"], ["b"]]
    LAYOUTS[layout](tmp_path, several)
    source = open_captions(tmp_path)
    for i, texts in enumerate(several):
        drawn = [source.read(i, False, np.random.default_rng(k))["caption"] for k in range(60)]
        assert set(drawn) == set(texts) and source.texts(i) == texts
        counts = [drawn.count(text) for text in texts]
        assert min(counts) > 0.4 * 60 / len(texts)
    again = source.read(0, False, np.random.default_rng(7))["caption"]
    assert again == source.read(0, False, np.random.default_rng(7))["caption"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_captions_are_counted_and_the_first_named(tmp_path, layout):
    texts: list = [f"caption {i}" for i in range(20)]
    missing = (1, 4, 5, 6, 7, 12, 19)
    for i in missing:
        texts[i] = "  " if i % 2 else None
    if layout in ("csv", "sidecars"):
        texts = [text or "" for text in texts]
    LAYOUTS[layout](tmp_path, texts)
    if layout == "sidecars":
        for i in missing:
            (tmp_path / "a.b" / f"{i:03}.txt").unlink()
    line = refused(tmp_path)
    first = ["row 1", "row 0", "row 1", "row 2", "row 3"] if layout == "parquet" else [f"{i:03}" for i in missing[:5]]
    assert "7 of 20 pictures have no caption" in line and all(name in line for name in first) and "2 more" in line


@pytest.mark.parametrize("text", [b"", b" \n", b"\xff\xfe\x00"])
def test_a_text_file_that_says_nothing_is_a_broken_record(tmp_path, text):
    sidecars(tmp_path, WORDS)
    (tmp_path / "a.b" / "002.txt").write_bytes(text)
    with pytest.raises(data.BrokenRecord) as caught:
        open_captions(tmp_path).read(2, False, np.random.default_rng(0))
    assert caught.value.where.endswith("002.png") and "\n" not in caught.value.reason


def test_pictures_that_the_listing_does_not_name_have_no_caption(tmp_path):
    jsonl(tmp_path, WORDS)
    pictures(tmp_path, 2, "other/")
    assert "2 of 8 pictures have no caption: other/000.png, other/001.png" in refused(tmp_path)


def test_a_listing_that_names_no_such_picture(tmp_path):
    jsonl(tmp_path, WORDS)
    (tmp_path / "sub" / "003.png").unlink()
    assert "sub/003.png, which is not there" in refused(tmp_path)
    (tmp_path / "sub" / "004.png").unlink()
    assert "sub/003.png, sub/004.png, which are not there" in refused(tmp_path)


def test_a_listing_may_name_a_picture_twice_and_elsewhere(tmp_path):
    pictures(tmp_path / "set", 1)
    pictures(tmp_path / "beside", 1)
    rows = [("./000.png", "one"), ("000.png", "two"), ("../beside/000.png", "three")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(lines))
    source = open_captions(tmp_path / "set")
    assert [source.read(i, False, np.random.default_rng(0))["caption"] for i in range(3)] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ":3 cannot be read"),
        ('["000.png", "x"]', ":3 cannot be read: it is no JSON object"),
        ('{"file": "000.png", "text": "x"}', ":3 has no `file_name`"),
        ('{"file_name": "sub/000.png", "text": 7}', "is a string or a list of strings, found '7'"),
        ('{"file_name": "sub/000.png", "text": ["a", 7]}', "is a string or a list of strings"),
        ('{"file_name": "sub/000.png", "text": "\\ud800"}', "not valid Unicode"),
        ('{"file_name": "sub/000.png", "title": "x"}', "1 of 3 pictures have no caption"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, words):
    jsonl(tmp_path, ["x", "y"])
    file = tmp_path / "metadata.jsonl"
    file.write_text(file.read_text().replace("\n\n", "\n") + "\n" + line)
    assert words in refused(tmp_path)


def test_a_folder_without_captions_or_pictures(tmp_path):
    assert "holds no pictures" in refused(tmp_path)
    pictures(tmp_path)
    assert "6 of 6 pictures have no caption" in refused(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    assert "no rows" in refused(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text")
    assert "more than one form: metadata.jsonl, metadata.csv" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "none")


def test_a_broken_picture_is_replaced_and_listed(tmp_path):
    jsonl(tmp_path, [f"caption {i}" for i in range(12)])
    (tmp_path / "sub" / "005.png").write_bytes(b"")
    log = tmp_path / "bad.jsonl"
    with data.batches(open_captions(tmp_path), batch_size=6, seed=0, bad_log=log) as reader:
        assert all(5 not in next(reader)["index"] for _ in range(6))
    assert [json.loads(line)["path"] for line in log.read_text().splitlines()] == [str(tmp_path / "sub" / "005.png")]


def test_the_fingerprint_follows_names_and_captions(tmp_path):
    jsonl(tmp_path / "a", WORDS)
    jsonl(tmp_path / "b", WORDS)
    jsonl(tmp_path / "c", [*WORDS[1:], WORDS[0]])
    a, b, c = (open_captions(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_a_listing_of_many_rows_pickles_small(tmp_path):
    pictures(tmp_path, 1)
    row = {"file_name": "000.png"}
    lines = (json.dumps({**row, "text": [f"caption {i}", "x"] if i % 3 else f"caption {i}"}) for i in range(20_000))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = open_captions(tmp_path)
    assert len(source) == 20_000 and len(pickle.dumps(source)) < 20_000 * 128
    assert source.texts(9_999) == ["caption 9999"] and source.texts(10_000) == ["caption 10000", "x"]


def test_parquet_may_be_one_file_of_plain_bytes_and_others_splits_are_left(tmp_path):
    write_parquet(tmp_path / "one.parquet", table(WORDS, plain=True))
    for path in (tmp_path, tmp_path / "one.parquet"):
        source = open_captions(path)
        assert [int(source.read(i, False, np.random.default_rng(0))["image"][0, 0, 0]) for i in range(6)] == [
            *range(0, 60, 10)
        ]
    write_parquet(tmp_path / "set" / "train-0.parquet", table(WORDS))
    write_parquet(tmp_path / "set" / "test-0.parquet", table(["no"]))
    assert len(open_captions(tmp_path / "set")) == 6


def test_few_row_groups_are_held(tmp_path, monkeypatch):
    texts = [f"caption {i}" for i in range(20)]
    write_parquet(tmp_path / "a.parquet", table(texts))
    monkeypatch.setattr(parquets, "MOST_BYTES", 300)
    source = open_captions(tmp_path)
    small = len(pickle.dumps(source))
    for i in np.random.default_rng(0).integers(20, size=100):
        assert int(source.read(i, False, np.random.default_rng(0))["image"][0, 0, 0]) == 10 * i
        layout = source._layout
        assert layout._bytes == sum(kept.nbytes for kept in layout._kept.values()) <= 300 or len(layout._kept) == 1
    assert len(pickle.dumps(source)) == small, "what was read does not travel to workers"


def test_rows_of_parquet_that_are_no_pictures_are_broken_records(tmp_path):
    write_parquet(tmp_path / "x.parquet", table(WORDS, values=[png(0), None, b"", png(30), png(40), b"text"]))
    source = open_captions(tmp_path)
    broken = []
    for i in range(6):
        try:
            source.read(i, False, np.random.default_rng(0))
        except data.BrokenRecord as error:
            broken.append((error.where, error.reason))
    assert [where for where, _ in broken] == [f"{tmp_path / 'x.parquet'} row {i}" for i in (1, 2, 5)]
    assert "no bytes" in broken[0][1]


def test_damaged_row_groups_are_broken_records(tmp_path):
    parquet(tmp_path, [f"caption {i}" for i in range(8)])
    source = open_captions(tmp_path)
    file = tmp_path / "data" / "train-00000-of-00002.parquet"
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(data.BrokenRecord) as caught:
        source.read(0, False, np.random.default_rng(0))
    assert "train-00000" in caught.value.where
    assert source.read(5, False, np.random.default_rng(0))["caption"] == "caption 5"


def test_parquet_of_another_form_is_one_line(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a" / "x.parquet", table(WORDS, key="title"))
    assert "title: string" in refused(tmp_path / "a") and "x.parquet" in refused(tmp_path / "a")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    assert "cannot be read as parquet" in refused(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "pip install 'jax-jdiff[parquet]'" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("openmoji", {"split": "test"}, "all, train, heldout"),
        ("captions", {"split": "train"}, "openmoji alone"),
        ("openmoji", {"buckets": ((8, 8),)}, "captions and imagefolder"),
        ("imagefolder", {"random_crop": True}, "no random crop"),
        ("captions", {}, "data.path is missing"),
    ],
)
def test_options_that_a_source_has_not_are_refused(name, options, words):
    with pytest.raises(data.DataError, match=words):
        data.open_source(name, image_size=SIZE, **options)


def test_openmoji_is_split_once_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("JDIFF_CACHE", str(tmp_path))
    every, train, heldout = (data.open_source("openmoji", image_size=8, split=s) for s in ("all", "train", "heldout"))
    assert len(train) + len(heldout) == len(every) == 1903 and 150 < len(heldout) < 230
    assert len({every.fingerprint, train.fingerprint, heldout.fingerprint}) == 3
    assert len(list((tmp_path / "openmoji").iterdir())) == 1, "the drawings are kept once"

    def held(source):
        records = [source.read(i, False, np.random.default_rng(0)) for i in range(len(source))]
        return [(r["caption"], int(r["label"]), r["image"].tobytes()) for r in records]

    assert sorted(held(train) + held(heldout)) == sorted(held(every))
    assert held(pickle.loads(pickle.dumps(heldout))) == held(heldout)
    assert "red apple" in {every.texts(i)[0] for i in range(len(every))}
    assert np.bincount(heldout.labels, minlength=10).min() >= 0 and len(set(heldout.labels.tolist())) >= 9


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_tfds_with_a_text_feature(tmp_path, several, labelled):
    tfds = pytest.importorskip("tensorflow_datasets")
    writing = pytest.importorskip("array_record.python.array_record_module")
    from tensorflow_datasets.core import example_serializer

    texts = [[word, f"also {word}"] if several else word for word in WORDS]
    text = tfds.features.Sequence(tfds.features.Text()) if several else tfds.features.Text()
    kinds = {"image": tfds.features.Image(shape=(None, None, 1)), "caption": text}
    kinds |= {"label": tfds.features.ClassLabel(names=["cat", "dog"])} if labelled else {}
    features = tfds.features.FeaturesDict(kinds)
    features.save_config(str(tmp_path))
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    writer = writing.ArrayRecordWriter(str(tmp_path / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for i in range(6):
        example = {"image": io.BytesIO(png(10 * i)), "caption": texts[i]} | ({"label": i % 2} if labelled else {})
        writer.write(serializer.serialize_example(features.encode_example(example)))
    writer.close()
    layout = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"name": "train", "shardLengths": ["6"], "numBytes": "100", "filepathTemplate": layout}
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    source = data.open_source("tfds", path=str(tmp_path), image_size=SIZE)
    assert source.has_captions and source.class_names == (["cat", "dog"] if labelled else ["tiny"])
    for i in range(6):
        record = source.read(i, False, np.random.default_rng(0))
        assert source.texts(i) == (texts[i] if several else [texts[i]]) and record["caption"] in source.texts(i)
        assert record["label"] == (i % 2 if labelled else 0) and np.all(record["image"] == 10 * i)
