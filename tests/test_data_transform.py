"""A transform runs on each record where it is read, with randomness of the record's place alone; batches stack what it gives."""

import dataclasses

import numpy as np
import pytest

from jdiff import data
from jdiff.data.prompts import Prompts
from jdiff.data.reader import stack


class Words:
    """A source of captions: five tags each, and a picture of one pixel."""

    name, kind, shape, buckets, has_captions = "words", "image", (1, 1, 3), None, True
    class_names, fingerprint, num_classes = ["all"], "x", 1

    def __len__(self):
        return 13

    def texts(self, index):
        return [", ".join(f"{letter}{index}" for letter in "abcde")]

    def read(self, index, flip, rng):
        return {"image": np.full((1, 1, 3), index, np.uint8), "label": np.int32(0), "caption": self.texts(index)[0]}


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer: one id a letter, of 30 at most."""

    length: int = 30

    def __call__(self, texts, on_long="error"):
        if on_long == "error" and max(map(len, texts)) > self.length:
            raise ValueError(f"{texts[0]!r} is too long:\nof {len(texts[0])} letters")
        return np.array([[ord(c) for c in text[: self.length].ljust(self.length)] for text in texts], np.int32)


def draw(record, rng):
    return {**record, "number": float(rng.random()), "count": 7, "flag": True, "pair": np.float64([1, 2])}


def take(steps, transform=None, source=None, **options):
    options = {"batch_size": 8, "seed": 3, "flip": False, "transform": transform, **options}
    with data.batches(source or Words(), **options) as reader:
        return [next(reader) for _ in range(steps)]


def test_numbers_and_arrays_are_stacked_and_strings_dropped():
    (batch,) = take(1, draw)
    assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
        "image": (np.uint8, (8, 1, 1, 3)),
        "label": (np.int32, (8,)),
        "index": (np.int32, (8,)),
        "number": (np.float32, (8,)),
        "count": (np.int32, (8,)),
        "flag": (np.bool_, (8,)),
        "pair": (np.float64, (8, 2)),
    }
    assert len(set(batch["number"].tolist())) == 8


@pytest.mark.parametrize(("workers", "start", "count"), [(0, 3, 1), (2, 0, 1), (2, 3, 2), (0, 3, 4)])
def test_a_transforms_draws_depend_on_seed_and_position_alone(workers, start, count):
    whole = take(8, draw)
    for index in range(count):
        rows = range(index * 8 // count, (index + 1) * 8 // count)
        part = take(8 - start, draw, workers=workers, start_step=start, rows=rows)
        for a, b in zip(part, whole[start:], strict=True):
            assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k][rows]) for k in a)
    numbers = np.concatenate([batch["number"] for batch in whole])
    assert len(set(numbers.tolist())) == 64, "each position has its own"
    assert not np.array_equal(take(1, draw, seed=4)[0]["number"], whole[0]["number"])


def test_a_transform_leaves_the_rest_of_the_batch_as_it_was():
    for a, b in zip(take(4), take(4, draw), strict=True):
        assert a.keys() == {"image", "label", "index"} and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"a": 1}, {"b": 1}], "'a' is in 1 of a batch's 2 records"),
        ([{"a": 1}, {"a": 1, "b": 1}], "'b' is in 1"),
        ([{"a": np.zeros(2)}, {"a": np.zeros(3)}], r"'a' differs .*float64 \[2\] and float64 \[3\]"),
        ([{"a": np.float32(0)}, {"a": np.int32(0)}], r"'a' differs .*float32 \[\] and int32 \[\]"),
        ([{"a": None}], "'a' of a record is of type NoneType"),
        ([{"a": [1, 2]}], "'a' of a record is of type list"),
    ],
)
def test_what_does_not_stack_is_named(records, words):
    with pytest.raises(data.DataError, match=words):
        stack(records)


def test_prompts_tokenize_the_caption():
    source = Words()
    (batch,) = take(1, Prompts(Letters()))
    assert batch["tokens"].dtype == np.int32 and batch["tokens"].shape == (8, 30)
    assert np.array_equal(batch["tokens"], Letters()([source.texts(i)[0] for i in batch["index"]]))


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_tags_are_shuffled_behind_those_kept(keep):
    transform = Prompts(Letters(), shuffle_tags=True, keep_tags=keep)
    orders = set()
    for batch in take(20, transform):
        for index, ids in zip(batch["index"], batch["tokens"], strict=True):
            tags = "".join(map(chr, ids)).strip().split(", ")
            assert sorted(tags) == [f"{letter}{index}" for letter in "abcde"]
            assert [tag[0] for tag in tags[:keep]] == list("abcde")[:keep]
            orders.add("".join(tag[0] for tag in tags))
    assert len(orders) == {0: len(orders), 1: 24, 3: 2}[keep] and len(orders) > 1
    for workers in (0, 1):
        a, b = take(3, transform), take(3, transform, workers=workers)
        assert all(np.array_equal(x["tokens"], y["tokens"]) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_caption_that_is_too_long_is_a_broken_record(tmp_path, workers):
    log = tmp_path / "bad.jsonl"
    length = len(Words().texts(0)[0])  # records 10 to 12 have longer ones
    got = take(6, Prompts(Letters(length)), bad_log=log, workers=workers)
    assert max(int(batch["index"].max()) for batch in got) == 9
    lines = log.read_text().splitlines()
    assert len(lines) == 3 and all("a1" in line and "too long: of" in line for line in lines)
    take(6, Prompts(Letters(length), on_long="truncate_loudly"), bad_log=tmp_path / "none", workers=workers)
    assert not (tmp_path / "none").exists()


def test_prompts_refuse_what_has_no_caption_or_no_one_length():
    with pytest.raises(data.DataError, match="no captions"):
        Prompts(Letters())({"image": np.zeros(1)}, np.random.default_rng(0))
    with pytest.raises(data.DataError, match="on_long='chunk'"):
        Prompts(Letters(), on_long="chunk")


def fail(record, rng):
    raise data.DataError("the transform says no")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transforms_error_reaches_the_reader(workers):
    with pytest.raises(Exception, match="the transform says no"):
        take(1, fail, workers=workers)
