"""CLIP's tokens equal transformers'; long prompts are refused, chunked or cut aloud; weights follow the web UI's grammar."""

import gzip
import importlib.util
import json
import logging
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.tokens import Tokenizer, apply_weights, encode_chunks, parse_weights, weighted
from jdiff.tokens.clip import SYMBOLS

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
COLOURS = ("red", "green", "blue", "yellow", "white", "black")
THINGS = (
    "fox",
    "apple",
    "house",
    "flag",
    "smiling face",
    "flower",
    "foxes",
    "don't care",
    "café",
    "日本 map",
    "🦊 emoji",
)
CAPTIONS = [f"{colour} {thing}, no. {i}" for i, thing in enumerate(THINGS) for colour in COLOURS]
LAYOUTS = ("pair", "whole", "sd2", "sd2_ids", "new_tokens", "new_tokens_ids", "new_tokens_whole")
PROMPTS = (
    *(
        "",
        " ",
        "a",
        "A RED FOX",
        "a  double   blank",
        "tabs\tand\nnew\r\nlines",
        "  first",
        "last  ",
        "\n\n",
        "fox\x0bfox",
    ),
    *(
        "don't can't I'll we've you're he'd I'm it's",
        "DON'T",
        "rock'n'roll",
        "'s",
        "''",
        "'tis x's'y",
        "it’s",
        "123's",
        "l'été",
    ),
    *(
        "12345 3.14 1,000",
        "x²+y³",
        "½ ¼",
        "①②",
        "Ⅷ",
        "1a2b3c v1.5",
        "16:9",
        "$100 €50 £5",
        "50% off",
        "e=mc^2",
        "3d f/1.8 85mm",
    ),
    *(
        "café naïve",
        "cafe\u0301",
        "Ünïcödé ß ẞ",
        "İstanbul ı",
        "ΣΑΣ ς",
        "ﬁ ﬀ",
        "Å \u212b",
        "a\u0300\u0301\u0302",
        "Ａ ｆｕｌｌ",
        "ǅ Ǆ",
    ),
    *("日本語", "Привет, мир", "العربية", "עברית", "हिन्दी", "ไทย", "한국어", "𝓯𝓪𝓷𝓬𝔂", "Z̸a̷l̶", "日本 and fox 🦊!!"),
    *(
        "🦊",
        "👩‍👩‍👧 family",
        "🇩🇪 flag",
        "❤️ ☃",
        "→ ← ™ ®",
        "\u00a0nbsp\u00a0",
        "\u200bzero",
        "\u3000wide",
        "\ufeffbom",
        "a\u00adb",
    ),
    *("\x00nul", "\x1f\x7f", "\u0085nel", "\u2028 \u2029", "\ue000", "\U0010ffff", "\u1e9b\u0323", "=\u0338"),
    *(
        "&amp; &lt;b&gt; &quot;",
        "&#39;x&#39; &#x27;",
        "<b>bold</b>",
        "http://example.com/a?b=c&d=e",
        "user@example.com",
    ),
    *(
        "#tag @user",
        "snake_case camelCase kebab-case",
        "C:\\path",
        "a/b|c",
        "...",
        "!!!",
        "fox!",
        "! fox",
        "?!",
        "—–-",
        "“q” ‘s’",
    ),
    *(
        EOS,
        f"a {BOS} b",
        "<|ENDOFTEXT|>",
        "<|StartOfText|>",
        f"{EOS}x{EOS}",
        "<| endoftext |>",
        "word</w>",
        "</w> Ġ",
        "__ ~~ ``",
    ),
    *(
        "masterpiece,best quality,1girl",
        "a photo of a cat, 4k, 8K, trending",
        "the the the",
        "SD-XL",
        "a;b:c",
        "\U0001f98a\ufe0f",
    ),
    *("a <cat-toy> x<cat-toy>y", "<CAT-TOY> <dog>", "(red:1.3) [blue] {x}", "supercalifragilistic", "aaaaaaaaaaaa"),
)


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """A tokenizer learnt from a few captions."""
    return Tokenizer.train(CAPTIONS, 580)


def flags(content: str, **more: bool) -> dict:
    """A token as tokenizer_config.json has it."""
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": True, "single_word": False, **more}


def write(folder: Path, vocab: dict[str, int], merges: list[str], layout: str = "pair") -> Path:
    """A tokenizer folder as transformers and diffusers checkpoints have it, in one of LAYOUTS."""
    from transformers import CLIPTokenizer

    folder.mkdir()
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "pad_token": EOS}
    config |= {f"{part}_token": flags(token) | {"__type": "AddedToken"} for part, token in (("bos", BOS), ("eos", EOS))}
    config |= {"unk_token": flags(EOS) | {"__type": "AddedToken"}}
    new = {"<cat-toy>": len(vocab), "<Dog>": len(vocab) + 1}
    files = {"vocab.json": vocab, "tokenizer_config.json": config}
    if layout == "sd2":
        files["special_tokens_map.json"] = {"bos_token": flags(BOS), "eos_token": flags(EOS), "pad_token": "!"}
    elif layout == "sd2_ids":
        special = {"!": vocab["!"], BOS: vocab[BOS], EOS: vocab[EOS]}
        decoder = {str(i): flags(token, normalized=False, special=True) for token, i in special.items()}
        config |= {"pad_token": "!", "added_tokens_decoder": decoder}
    elif layout == "new_tokens":
        files["added_tokens.json"] = new
    elif layout == "new_tokens_ids":
        special = {str(vocab[token]): flags(token, special=True) for token in (BOS, EOS)}
        config["added_tokens_decoder"] = special | {str(i): flags(token, special=False) for token, i in new.items()}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges), encoding="utf-8")
    if layout.endswith("whole"):
        theirs = CLIPTokenizer.from_pretrained(folder)
        if layout == "new_tokens_whole":
            theirs.add_tokens(list(new))
        shutil.rmtree(folder)
        theirs.save_pretrained(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    return folder


def parts(tokenizer: Tokenizer, folder: Path) -> tuple[dict[str, int], list[str]]:
    """The vocabulary and merges that a tokenizer saves."""
    tokenizer.save(folder)
    lines = (folder / "merges.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return json.loads((folder / "vocab.json").read_text(encoding="utf-8")), lines[1:]


@pytest.fixture
def folder(small, tmp_path) -> Path:
    """The small tokenizer's vocab.json, merges.txt and tokenizer_config.json."""
    return write(tmp_path / "tokenizer", *parts(small, tmp_path / "saved"))


def assert_equal_ids(ours: Tokenizer, folder: Path) -> None:
    """Ids of all PROMPTS are transformers', padding included, and so they are after saving and pickling."""
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(folder)
    want = np.asarray(theirs(list(PROMPTS), padding="max_length")["input_ids"])
    np.testing.assert_array_equal(ours(PROMPTS), want)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ours))(PROMPTS), want)
    ours.save(folder.parent / "again")
    again = Tokenizer.from_folder(folder.parent / "again")
    assert again.fingerprint == ours.fingerprint
    again_theirs = CLIPTokenizer.from_pretrained(folder.parent / "again")
    np.testing.assert_array_equal(again_theirs(list(PROMPTS), padding="max_length")["input_ids"], want)
    assert len(set(PROMPTS)) == len(PROMPTS) >= 100
    assert ours.vocab_size == len(theirs) and want.max() < ours.vocab_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_transformers(small, layout, tmp_path):
    path = write(tmp_path / "tokenizer", *parts(small, tmp_path / "saved"), layout)
    ours = Tokenizer.from_folder(path)
    assert_equal_ids(ours, path)
    assert ours.vocab_size - small.vocab_size == (2 if layout.startswith("new") else 0)
    pad = ours.encode("!")[0] if layout.startswith("sd2") else ours.eos_id
    assert ours.null.tolist() == [ours.bos_id, ours.eos_id] + 75 * [pad]


@pytest.mark.parametrize("layout", ("pair", "whole", "sd2"))
def test_ids_are_transformers_with_the_real_table(layout, tmp_path):
    table = "bpe_simple_vocab_16e6.txt.gz"  # in clip-anytorch and open_clip_torch
    specs = [spec for name in ("clip", "open_clip") if (spec := importlib.util.find_spec(name))]
    places = [Path(place, table) for spec in specs for place in spec.submodule_search_locations or ()]
    found = [place for place in places if place.exists()]
    if not found:
        pytest.skip(f"no installed package holds {table}")
    merges = gzip.decompress(found[0].read_bytes()).decode().split("\n")[1 : 1 + 49408 - 512 - 2]
    words = [*SYMBOLS, *(merge.replace(" ", "") for merge in merges), BOS, EOS]
    path = write(tmp_path / "tokenizer", {word: i for i, word in enumerate(words)}, merges, layout)
    ours = Tokenizer.from_folder(path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (
        49408,
        49406,
        49407,
        0 if layout == "sd2" else 49407,
    )
    assert ours.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]  # OpenAI's
    assert_equal_ids(ours, path)


def test_rows_are_framed_and_padded(small):
    ids = small(["red fox", ""])
    assert ids.dtype == np.int32 and ids.shape == (2, 77)
    inner = small.encode("red fox")
    assert ids[0].tolist() == [small.bos_id, *inner] + (76 - len(inner)) * [small.eos_id]
    assert ids[1].tolist() == small.null.tolist()
    assert small([]).shape == (0, 77)


def test_what_is_no_list_of_texts_is_refused(small):
    with pytest.raises(TypeError, match=r"list of texts.*\['red fox'\]"):
        small("red fox")
    with pytest.raises(TypeError, match="found a NoneType"):
        small(["red fox", None])
    with pytest.raises(ValueError, match=r"no Unicode text: .* at character 2"):
        small(["a \ud800"])
    with pytest.raises(ValueError, match=r"on_long='truncate'.*error, chunk, truncate_loudly"):
        small(["a"], on_long="truncate")


def test_long_texts_are_refused_and_the_lost_words_named(small):
    assert len(small.encode("fox")) == 1 and len(small.encode("unheard-of")) > 3  # so the cut is within a word
    words = " ".join(["fox"] * 74) + " unheard-of\nlast words"
    with pytest.raises(ValueError, match=r"tokens, and 75 fit: shorten it by 'unheard-of last words'") as error:
        small(["red", words])
    assert "\n" not in str(error.value)
    assert small([" ".join(["fox"] * 75)]).shape == (1, 77)
    with pytest.raises(ValueError, match="has 76 tokens, and 75 fit: shorten it by 'fox'"):
        small([" ".join(["fox"] * 76)])


def test_truncation_is_transformers_and_is_loud(small, folder, caplog):
    from transformers import CLIPTokenizer

    text = "A red fox in the house, " * 20
    want = CLIPTokenizer.from_pretrained(folder)([text], truncation=True, padding="max_length")["input_ids"]
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(small([text], on_long="truncate_loudly"), want)
    assert "house" in caplog.text and "left out" in caplog.text
    caplog.clear()
    small(["short"], on_long="truncate_loudly")
    assert not caplog.text


@pytest.mark.parametrize("count", (0, 1, 74, 75, 76, 150, 151))
def test_chunks_hold_every_token_once(small, count):
    ids = small([" ".join(["fox", "red"] * count)[: 4 * count], "red"], on_long="chunk")
    n = max(1, -(-count // 75))
    assert ids.shape == (2, n * 77)
    inner = small.encode(" ".join(["fox", "red"] * count)[: 4 * count])
    assert len(inner) == count
    for c, chunk in enumerate(ids[0].reshape(n, 77)):
        piece = inner[75 * c : 75 * c + 75]
        assert chunk.tolist() == [small.bos_id, *piece, small.eos_id] + (75 - len(piece)) * [small.pad_id]
    np.testing.assert_array_equal(ids[1].reshape(n, 77)[1:], np.tile(small.null, (n - 1, 1)))


def test_training_is_deterministic_in_any_process_and_order(small):
    script = f"from jdiff.tokens import Tokenizer; print(Tokenizer.train({CAPTIONS[::-1]!r}, 580).fingerprint)"
    prints = {subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout for _ in range(2)}
    assert prints == {small.fingerprint + "\n"}


def test_training_learns_words_and_keeps_all_bytes(small):
    assert small.vocab_size == 580 and small.eos_id == 579 and small.bos_id == 578
    assert len(small.encode("red fox")) == 2  # seen often: one token a word
    bytes_alone = Tokenizer.train([], 514, max_length=32)
    assert bytes_alone.vocab_size == 514 and bytes_alone.null.shape == (32,)
    assert len(bytes_alone.encode("fox 🦊")) == 3 + 4
    assert Tokenizer.train(CAPTIONS, 100_000).vocab_size < 2000
    with pytest.raises(ValueError, match=r"vocab_size=513 .* 514"):
        Tokenizer.train(CAPTIONS, 513)
    with pytest.raises(ValueError, match="model_max_length=2"):
        Tokenizer.train(CAPTIONS, 580, max_length=2)


def test_fingerprint_sees_what_ids_depend_on(small):
    others = (Tokenizer.train(CAPTIONS, 579), Tokenizer.train(CAPTIONS, 580, 64), Tokenizer.train(CAPTIONS[1:], 580))
    assert len({small.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert pickle.loads(pickle.dumps(small)).fingerprint == small.fingerprint


def test_data_workers_import_no_jax():
    script = "import sys, jdiff.tokens; assert not {'jax', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_saving_beside_another_tokenizer_is_refused(small, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json, which would be read instead"):
        small.save(tmp_path)


def _edit(name, change):
    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(change(content) or content), encoding="utf-8")

    return edit


def _merges(change):
    def edit(folder: Path) -> None:
        path = folder / "merges.txt"
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return edit


BROKEN = {
    "no folder": (shutil.rmtree, "there is no such folder"),
    "no vocab": (lambda f: (f / "vocab.json").unlink(), r"no vocab\.json; the folder needs"),
    "no merges": (lambda f: (f / "merges.txt").unlink(), r"no merges\.txt; the folder needs"),
    "no config": (lambda f: (f / "tokenizer_config.json").unlink(), r"no tokenizer_config\.json; the folder needs"),
    "nothing": (
        lambda f: [p.unlink() for p in f.iterdir()],
        r"no vocab\.json and no merges\.txt and no tokenizer_config\.json",
    ),
    "cut vocab": (lambda f: (f / "vocab.json").write_text('{"a": 0, '), r"vocab\.json is no JSON"),
    "vocab is a list": (lambda f: (f / "vocab.json").write_text("[]"), r"vocab\.json holds a list"),
    "vocab of texts": (_edit("vocab.json", lambda v: {"a": "b"}), r"vocab\.json must map tokens to whole numbers"),
    "gap in ids": (_edit("vocab.json", lambda v: v.update({EOS: 9999})), "580 ids must be 0 to 579, each once; id 579"),
    "ids twice": (_edit("vocab.json", lambda v: v.update({EOS: 3})), "each once; id 4 is missing or not unique"),
    "fewer merges": (
        _merges(lambda text: "\n".join(text.split("\n")[:-3])),
        r"580 tokens and 64 merges are not of one tokenizer: no merge makes '.*' and 1 more",
    ),
    "more merges": (
        _merges(lambda text: text + "q zz\n"),
        r"580 tokens and 67 merges .*: merge 67 \(q zz\) needs 'zz'",
    ),
    "merge of three": (_merges(lambda text: text + "q z z\n"), r"merges\.txt line 68: expected two tokens"),
    "merges of bytes": (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe"), r"merges\.txt cannot be read: .*utf-8"),
    "unknown pad": (
        _edit("tokenizer_config.json", lambda c: c.update(pad_token="<pad>")),
        "pad_token='<pad>' is not among the 580 tokens",
    ),
    "unknown bos": (
        _edit("tokenizer_config.json", lambda c: c["bos_token"].update(content="<s>")),
        "bos_token='<s>' is not among the 580 tokens",
    ),
    "odd token": (_edit("tokenizer_config.json", lambda c: c.update(bos_token={"text": "x"})), "is no token"),
    "no length": (
        _edit("tokenizer_config.json", lambda c: {k: v for k, v in c.items() if k != "model_max_length"}),
        "lacks model_max_length",
    ),
    "huge length": (
        _edit("tokenizer_config.json", lambda c: c.update(model_max_length=10**30)),
        "model_max_length=1000",
    ),
    "added token with a gap": (lambda f: (f / "added_tokens.json").write_text('{"<x>": 700}'), "id 580 is missing"),
    "added token with two ids": (
        lambda f: (f / "added_tokens.json").write_text('{"fox</w>": 580}'),
        r"'fox</w>' has two ids: \d+ in the vocabulary, 580",
    ),
    "another kind": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}'),
        "found a Unigram model",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_clear_line(case, folder):
    damage, message = BROKEN[case]
    assert Tokenizer.from_folder(folder).vocab_size == 580
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(folder)
    assert str(error.value).startswith(f"tokenizer {folder}: ") and "\n" not in str(error.value)


def test_a_byte_without_a_token_is_named(folder):
    vocab = json.loads((folder / "vocab.json").read_text())
    words = [word for word in vocab if word not in ("q", "q</w>")]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode(f"red {EOS}") == [*tokenizer.encode("red"), tokenizer.eos_id]
    with pytest.raises(ValueError, match="no token for 'q' in 'red quill'"):
        tokenizer.encode("red quill")


DOCUMENTED = {  # the web UI's own examples
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    "([(unbalanced": [("unbalanced", 1.1)],
    "((twice [once": [("twice ", 1.21), ("once", 1.1)],
    "\\(literal\\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        *(("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1)),
        *(("sky", 1.4641), (".", 1.1)),
    ],
    "a (red:1.3) fox": [("a ", 1.0), ("red", 1.3), (" fox", 1.0)],
    "[less] (zero:0) (minus: -1 )": [("less", 1 / 1.1), (" ", 1.0), ("zero", 0.0), (" ", 1.0), ("minus", -1.0)],
    "at 12:30, [x:1.5]": [("at 12:30, ", 1.0), ("x:1.5", 1 / 1.1)],
    "closed) too] early:1.2)": [("closed) too] early:1.2)", 1.0)],
    "back\\slash \\\\ \\:": [("back\\slash \\ \\:", 1.0)],
    "(ratio:two)": [("ratio:two", 1.1)],
    "([mixed)]": [("mixed", 1.0)],
    "": [("", 1.0)],
    "()": [("", 1.0)],
}


@pytest.mark.parametrize("prompt", DOCUMENTED)
def test_weights_are_parsed_as_the_web_ui_documents(prompt):
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in DOCUMENTED[prompt]]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in DOCUMENTED[prompt]], rtol=1e-12)


def _random_prompt(rng: random.Random, depth: int, weight: float) -> tuple[str, list[tuple[str, float]]]:
    """A prompt of nested brackets, and its characters with their weights as they are drawn."""
    prompt, letters = "", []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(("text", "escape", "round", "square", "number")) if depth else "text"
        factor = {"round": 1.1, "square": 1 / 1.1, "number": rng.choice((0.25, 1.5, 2.0))}.get(kind, 1.0)
        if kind == "text":
            inner = rng.choice(("fox ", "a, ", "12-30", "é🦊", "\n"))
            more = [(letter, weight) for letter in inner]
        elif kind == "escape":
            more = [(rng.choice("()[]\\"), weight)]
            inner = "\\" + more[0][0]
        else:
            inner, more = _random_prompt(rng, depth - 1, weight * factor)
        shape = {"round": "({})", "square": "[{}]", "number": f"({{}}:{factor})"}.get(kind, "{}")
        prompt, letters = prompt + shape.format(inner), letters + more
    return prompt, letters


def test_nested_weights_multiply():
    rng = random.Random(0)
    for _ in range(300):
        prompt, letters = _random_prompt(rng, 4, 1.0)
        found = [(letter, weight) for text, weight in parse_weights(prompt) for letter in text]
        assert [letter for letter, _ in found] == [letter for letter, _ in letters], prompt
        np.testing.assert_allclose([w for _, w in found], [w for _, w in letters], rtol=1e-12, err_msg=prompt)


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"weight '1\.2\.3' in the prompt '\(x:1\.2\.3\)' is no number"):
        parse_weights("(x:1.2.3)")


def test_weighted_prompts_put_each_weight_at_its_token(small):
    ids, weights = weighted(small, ["red (fox:1.5), [[house]]", "(" + "fox " * 80 + ":0.5)", "red \\(fox\\)"])
    assert ids.shape == weights.shape == (3, 2 * 77) and (ids.dtype, weights.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(ids, small(["red fox, house", "fox " * 80, "red (fox)"], on_long="chunk"))
    assert [len(small.encode(text)) for text in ("red", "fox", ",", "house")] == [1, 1, 1, 1]
    want = np.ones((3, 2, 77), np.float32)
    want[0, 0, [2, 4]] = 1.5, 1 / 1.21
    want[1, 0, 1:76] = want[1, 1, 1:6] = 0.5  # BOS, EOS and padding keep 1
    np.testing.assert_allclose(weights.reshape(3, 2, 77), want, rtol=1e-6)
    with pytest.raises(TypeError, match="list of prompts"):
        weighted(small, "red fox")


@pytest.fixture(scope="session")
def text_model(small):
    """transformers' text encoder, tiny and random, with a final bias so that its states have a mean; numpy to numpy."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": small.bos_id, "eos_token_id": small.eos_id, "pad_token_id": small.pad_id}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=small.vocab_size, **sizes, **ends)).eval()
    with torch.no_grad():
        bias = next(value for name, value in model.named_parameters() if name.endswith("final_layer_norm.bias"))
        bias.normal_(0.3)

    def encode(ids):
        with torch.no_grad():
            return model(torch.tensor(np.asarray(ids), dtype=torch.long)).last_hidden_state.numpy()

    return encode


def test_chunks_are_encoded_each_by_itself(small, text_model):
    ids = small(["red fox, house " * 30, "flag"], on_long="chunk")
    assert ids.shape == (2, 2 * 77)
    want = np.concatenate([text_model(ids[:, :77]), text_model(ids[:, 77:])], axis=1)
    found = encode_chunks(lambda x: jnp.asarray(text_model(x)), jnp.asarray(ids))
    np.testing.assert_allclose(found, want, atol=1e-5)
    with pytest.raises(ValueError, match="rows of 154 tokens are not chunks of 64"):
        encode_chunks(lambda x: x, jnp.asarray(ids), length=64)


def test_weighted_states_keep_each_chunks_mean(small, text_model):
    import torch

    prompts = ["a (red:1.4) fox, [house] " * 20, "(flag:0.2) and ((apple))"]
    ids, weights = weighted(small, prompts)
    embeds = np.concatenate([text_model(chunk) for chunk in np.split(ids, ids.shape[1] // 77, axis=1)], axis=1)
    found = jax.jit(apply_weights)(jnp.asarray(embeds), jnp.asarray(weights))
    for b in range(len(prompts)):  # as the web UI does, a prompt and a chunk at a time
        for c in range(0, ids.shape[1], 77):
            z = torch.tensor(embeds[b : b + 1, c : c + 77])
            mean = z.mean()
            z = z * torch.tensor(weights[b : b + 1, c : c + 77, None])
            z = z * (mean / z.mean())
            np.testing.assert_allclose(found[b : b + 1, c : c + 77], z.numpy(), rtol=2e-5, atol=1e-6)


def test_weights_of_one_change_nothing(small, text_model):
    embeds = jnp.asarray(text_model(small(["red fox", "flag"])))
    for dtype in (jnp.float32, jnp.bfloat16):
        same = apply_weights(embeds.astype(dtype), jnp.ones((2, 77)))
        assert same.dtype == dtype
        np.testing.assert_array_equal(same, embeds.astype(dtype))


def test_states_without_a_mean_are_only_scaled():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 8, 6)).astype(np.float32)
    x -= x.mean(-1, keepdims=True)  # as a final LayerNorm without bias leaves them
    weights = np.ones((1, 8), np.float32)
    weights[0, 3] = 1.5
    np.testing.assert_allclose(
        apply_weights(jnp.asarray(x), jnp.asarray(weights), 8), x * weights[..., None], rtol=1e-6
    )
    zeros = apply_weights(jnp.zeros((1, 8, 6)), jnp.asarray(weights), 8)
    np.testing.assert_array_equal(zeros, 0)
    signs = np.tile(np.float32([1, -0.99]), (1, 4))  # these weights leave nearly no mean
    np.testing.assert_array_equal(apply_weights(jnp.ones((1, 8, 6)), jnp.asarray(signs), 8)[..., 0], signs)


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"weights of \(1, 7\) do not fit embeds of \(1, 8, 6\)"):
        apply_weights(jnp.zeros((1, 8, 6)), jnp.ones((1, 7)), 8)
    with pytest.raises(ValueError, match="rows of 8 tokens are not chunks of 77"):
        apply_weights(jnp.zeros((1, 8, 6)), jnp.ones((1, 8)))
