"""CLIP's byte-pair tokenizer (arXiv:2103.00020) on the `tokenizers` library; ids are those of transformers' CLIPTokenizer.

Shapes: B texts, S the text encoder's length (77 in Stable Diffusion), n chunks of S.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Encoding, Regex, models, normalizers, pre_tokenizers, trainers

from jdiff.tokens.files import BOS, DEFAULTS, EOS, Vocabulary, read_folder, write_folder

log = logging.getLogger(__name__)

ON_LONG = ("error", "chunk", "truncate_loudly")
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
"""One printable character for each of the 256 bytes, in CLIP's order."""
SYMBOLS = (*LETTERS, *(f"{letter}</w>" for letter in LETTERS))
"""What every CLIP vocabulary begins with: each byte within a word, and at its end."""
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Texts to ids: `tokenizer(["a red fox"])` is int32 (1, S), S = `max_length`.

    Each row is BOS, the text's tokens, EOS, then `pad_id` (EOS in Stable Diffusion 1, "!" in 2). Text is lower-cased, a run
    of white space counts as one blank, HTML entities stay as they are, and a special token written out is that token. It
    pickles, and importing it imports no JAX, so that data workers can have it.

    vocab_size: every id is below it. bos_id, eos_id, pad_id: the special tokens'.
    """

    def __init__(self, vocabulary: Vocabulary):
        """`from_folder` and `train` are the usual ways to one. ValueError: see `Vocabulary.check`."""
        vocabulary.check(SYMBOLS)
        self._vocabulary = vocabulary
        self._backend = _byte_pairs(vocabulary.vocab, vocabulary.merges, unk_token=vocabulary.parts["unk"])
        self._backend.add_tokens([token for _, token in sorted(vocabulary.added.items())])  # new ones get the next ids
        ids = vocabulary.vocab | {token.content: i for i, token in vocabulary.added.items()}
        self.bos_id, self.eos_id, self._unk_id, self.pad_id = (
            ids[vocabulary.parts[part]] for part in ("bos", "eos", "unk", "pad")
        )
        self.vocab_size = len(ids)
        self.max_length = vocabulary.max_length

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._vocabulary,)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer folder of a checkpoint: vocab.json and merges.txt, or tokenizer.json; and tokenizer_config.json.

        ValueError, one line that begins with the folder, for a missing or damaged file, a vocabulary and merges that do not
        belong together, or a special token without an id.
        """
        try:
            return cls(read_folder(Path(path)))
        except ValueError as error:
            raise ValueError(f"tokenizer {path}: {error}") from error

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, max_length: int = 77) -> "Tokenizer":
        """A small tokenizer of CLIP's kind, learnt from captions; the same captions always give the same one.

        vocab_size: the most ids. 514 (bytes and special tokens) are there before any merge, and a pair that is seen once
        only is not merged, so that few captions give fewer; the tokenizer's `vocab_size` says how many.
        """
        least = len(SYMBOLS) + 2
        if vocab_size < least:
            raise ValueError(
                f"vocab_size={vocab_size} is too small: the bytes and the special tokens alone are {least}"
            )
        learner = _byte_pairs({}, [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            min_frequency=2,
            show_progress=False,
            special_tokens=list(SYMBOLS),  # fixes their ids, by which ties are decided; else a hash table's order does
            end_of_word_suffix="</w>",
        )
        learner.train_from_iterator(captions, trainer)
        merges = [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]
        words = dict.fromkeys([*SYMBOLS, *(a + b for a, b in merges), BOS, EOS])
        vocab = {word: i for i, word in enumerate(words)}
        special = {vocab[token]: AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)}
        return cls(Vocabulary(vocab, merges, special, dict(DEFAULTS), max_length))

    def save(self, folder: str | Path) -> None:
        """Writes vocab.json, merges.txt and tokenizer_config.json, which `from_folder` and transformers read.

        ValueError when a tokenizer.json lies there, which both would read instead.
        """
        write_folder(self._vocabulary, Path(folder))

    def __call__(self, texts: Sequence[str], on_long: str = "error") -> np.ndarray:
        """Texts to ids, int32 (B, S); (B, n * S) with `on_long="chunk"`.

        on_long: what becomes of a text of more than S - 2 tokens. "error": a ValueError that names the words that do not
        fit. "chunk": each S - 2 tokens have a BOS and an EOS of their own, wherever that falls (see `encode_chunks`), and
        shorter texts get empty chunks until they are as long as the longest. "truncate_loudly": it is cut, and a warning
        names the words.
        """
        if isinstance(texts, str):
            raise TypeError(f"the tokenizer takes a list of texts, found one text: use [{_short(texts)!r}]")
        if on_long not in ON_LONG:
            raise ValueError(f"on_long={on_long!r} is unknown; use one of {', '.join(ON_LONG)}")
        room, rows = self.max_length - 2, []
        for text in texts:
            encoding = self._encode(text)
            if len(encoding.ids) > room and on_long != "chunk":
                found = f"{_short(text)!r} has {len(encoding.ids)} tokens, and {room} fit"
                lost = _short(_from_word(text, encoding.offsets[room][0]), 300)
                if on_long == "error":
                    raise ValueError(f"{found}: shorten it by {lost!r}, or choose on_long='chunk' or 'truncate_loudly'")
                log.warning("%s: left out is %r", found, lost)
            rows.append(encoding.ids if on_long == "chunk" else encoding.ids[:room])
        return self.frame(rows)

    @functools.cached_property
    def null(self) -> np.ndarray:
        """The ids of the empty text, int32 (S,)."""
        return self([""])[0]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of everything that ids depend on."""
        return hashlib.sha256(repr(self._vocabulary.files()).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """A text's ids alone: without BOS, EOS and padding, and as many as there are."""
        return self._encode(text).ids

    def frame(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Ids of `encode`, of any lengths, to int32 (B, n * S); n >= 1 is what the longest row needs.

        A row's token k stands in chunk k // (S - 2), at place 1 + k % (S - 2).
        """
        S, room = self.max_length, self.max_length - 2
        n = max([1, *(-(-len(row) // room) for row in rows)])
        ids = np.full((len(rows), n, S), self.pad_id, np.int32)
        for b, row in enumerate(rows):
            for c in range(n):
                chunk = [self.bos_id, *row[c * room : (c + 1) * room], self.eos_id]
                ids[b, c, : len(chunk)] = chunk
        return ids.reshape(len(rows), n * S)

    def _encode(self, text: str) -> Encoding:
        if not isinstance(text, str):
            raise TypeError(f"the tokenizer takes texts, found a {type(text).__name__}: {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{_short(text)!r} is no Unicode text: {error.reason} at character {error.start}"
            ) from error
        encoding = self._backend.encode(text, add_special_tokens=False)
        if self._unk_id in encoding.ids:  # written out, or a byte that this vocabulary lacks
            for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if i == self._unk_id and text[start:end].strip().lower() != self._vocabulary.parts["unk"].lower():
                    raise ValueError(f"the vocabulary has no token for {text[start:end]!r} in {_short(text)!r}")
        return encoding


def _byte_pairs(vocab: dict[str, int], merges: list[tuple[str, str]], **more: Any) -> tokenizers.Tokenizer:
    """The library's tokenizer with CLIP's normalisation, words and bytes."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", **more))
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _from_word(text: str, start: int) -> str:
    """The text from the beginning of the word in which place `start` lies."""
    while start and not text[start - 1].isspace():
        start -= 1
    return text[start:]


def _short(text: str, limit: int = 60) -> str:
    """One line of about `limit` characters at most, which says how much it leaves out."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}… and {len(line) - limit} more characters"
