"""What a CLIP tokenizer is made of, and its folder of files as Hugging Face writes them; read strictly."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
DEFAULTS = {"bos": BOS, "eos": EOS, "unk": EOS, "pad": EOS}
"""Which token plays which part where tokenizer_config.json does not say, as in transformers' CLIPTokenizer."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """All that a CLIP tokenizer's ids depend on.

    vocab: id by token. merges: pairs, the most frequent first. added: by id, tokens that are matched whole in a text before
    any merge: special ones, and new ones with the ids after `vocab`'s. parts: which token is bos, eos, unk and pad.
    max_length: the text encoder's, BOS and EOS included.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[int, AddedToken]
    parts: dict[str, str]
    max_length: int

    def check(self, symbols: Sequence[str]) -> None:
        """ValueError unless ids are 0..n-1, each once, the merges make just the vocabulary (but for `symbols`, the single
        bytes, and added tokens), special tokens have ids, and the length is one."""
        if not isinstance(self.max_length, int) or not 3 <= self.max_length <= 10_000:
            raise ValueError(
                f"model_max_length={self.max_length} is no text encoder's length; write CLIP's 77 or its own"
            )
        added = {token.content: i for i, token in self.added.items()}
        for token, i in added.items():
            if self.vocab.get(token, i) != i:
                raise ValueError(
                    f"the token {token!r} has two ids: {self.vocab[token]} in the vocabulary, {i} as added token"
                )
        ids = sorted((self.vocab | added).values())
        if ids != list(range(len(ids))):
            wrong = next(i for i, found in enumerate(ids) if i != found)
            raise ValueError(
                f"the {len(ids)} ids must be 0 to {len(ids) - 1}, each once; id {wrong} is missing or not unique"
            )
        for part, token in self.parts.items():
            if token not in self.vocab | added:
                raise ValueError(
                    f"{part}_token={token!r} is not among the {len(ids)} tokens: name one that is, or add it to the vocabulary"
                )
        sizes = f"{len(self.vocab)} tokens and {len(self.merges)} merges are not of one tokenizer"
        for number, (a, b) in enumerate(self.merges, 1):
            if lacking := [token for token in (a, b, a + b) if token not in self.vocab]:
                raise ValueError(f"{sizes}: merge {number} ({a} {b}) needs {lacking[0]!r}, which the vocabulary lacks")
        made = {*symbols, *(a + b for a, b in self.merges), *added, *self.parts.values()}
        if idle := [token for token in self.vocab if token not in made]:
            raise ValueError(
                f"{sizes}: no merge makes {idle[0]!r}" + (f" and {len(idle) - 1} more" if idle[1:] else "")
            )

    def files(self) -> dict[str, str]:
        """The texts of vocab.json, merges.txt and tokenizer_config.json."""
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_length,
            **{f"{part}_token": token for part, token in self.parts.items()},
            "added_tokens_decoder": {
                str(i): {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
                for i, token in sorted(self.added.items())
            },
        }
        vocab = dict(sorted(self.vocab.items(), key=lambda item: item[1]))
        return {
            "vocab.json": json.dumps(vocab, ensure_ascii=False),
            "merges.txt": "".join(f"{line}\n" for line in ("#version: 0.2", *map(" ".join, self.merges))),
            "tokenizer_config.json": json.dumps(config, indent=2),
        }


def read_folder(folder: Path) -> Vocabulary:
    """vocab.json with merges.txt, or tokenizer.json (which wins, as in transformers), and tokenizer_config.json.

    Special tokens are found as transformers finds them: in the config's `added_tokens_decoder`, or, where it has none, in
    tokenizer.json or added_tokens.json, while special_tokens_map.json overrides the config. ValueError names the file.
    """
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    whole = (folder / "tokenizer.json").exists()
    needed = ("tokenizer.json",) if whole else ("vocab.json", "merges.txt")
    if missing := [name for name in (*needed, "tokenizer_config.json") if not (folder / name).exists()]:
        raise ValueError(
            f"no {' and no '.join(missing)}; the folder needs vocab.json and merges.txt (or tokenizer.json), "
            "and tokenizer_config.json"
        )
    config = _json(folder / "tokenizer_config.json")
    vocab, merges, added = _read_whole(folder) if whole else _read_pair(folder)
    if "added_tokens_decoder" in config:
        added = {int(i): _added(token) for i, token in config["added_tokens_decoder"].items()}
    elif (folder / "special_tokens_map.json").exists():
        config |= _json(folder / "special_tokens_map.json")
    if "model_max_length" not in config:
        raise ValueError("tokenizer_config.json lacks model_max_length, the text encoder's (CLIP's is 77)")
    special = {part: _special(config.get(f"{part}_token") or token) for part, token in DEFAULTS.items()}
    # a token that plays several parts is matched as the last of them says, unless it is stored by id
    named = {vocab[token.content]: token for token in special.values() if token.content in vocab}
    parts = {part: token.content for part, token in special.items()}
    return Vocabulary(vocab, merges, named | added, parts, config["model_max_length"])


def write_folder(vocabulary: Vocabulary, folder: Path) -> None:
    """Writes `Vocabulary.files`; ValueError when a tokenizer.json lies there, which readers prefer."""
    if (folder / "tokenizer.json").exists():
        raise ValueError(
            f"{folder} holds a tokenizer.json, which would be read instead of what is saved: save elsewhere"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in vocabulary.files().items():
        (folder / name).write_text(text, encoding="utf-8")


def _read_pair(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, AddedToken]]:
    vocab = _vocab(_json(folder / "vocab.json"), "vocab.json")
    lines = (
        _text(folder / "merges.txt").removesuffix("\n").split("\n")
    )  # splitlines would split at characters of tokens
    first = int(lines[0].startswith("#version"))
    merges = [_pair(line.rstrip("\r"), f"merges.txt line {i}") for i, line in enumerate(lines[first:], first + 1)]
    path = folder / "added_tokens.json"
    added = _vocab(_json(path), path.name) if path.exists() else {}
    return vocab, merges, {i: AddedToken(token, normalized=True) for token, i in added.items()}


def _read_whole(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, AddedToken]]:
    content = _json(folder / "tokenizer.json")
    model = content.get("model", {})
    if (model.get("type"), model.get("end_of_word_suffix")) != ("BPE", "</w>"):
        found = f"a {model.get('type')} model with end_of_word_suffix={model.get('end_of_word_suffix')!r}"
        raise ValueError(f"tokenizer.json is no CLIP tokenizer: found {found}, expected BPE with '</w>'")
    merges = [_pair(merge, f"tokenizer.json merge {i}") for i, merge in enumerate(model.get("merges", []), 1)]
    added = {token.pop("id"): _added(token) for token in content.get("added_tokens", [])}
    return _vocab(model.get("vocab"), "tokenizer.json"), merges, added


def _vocab(content: Any, name: str) -> dict[str, int]:
    if not isinstance(content, dict) or not all(isinstance(i, int) for i in content.values()):
        raise ValueError(f"{name} must map tokens to whole numbers")
    return content


def _pair(merge: str | Sequence[str], where: str) -> tuple[str, str]:
    """A merge is "a b" or ["a", "b"]."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"{where}: expected two tokens to merge, found {merge!r}")
    return parts[0], parts[1]


def _special(token: str | dict[str, Any]) -> AddedToken:
    """A special token of the config, by its content alone or with flags."""
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    return _added({**token, "special": True})


def _added(fields: dict[str, Any]) -> AddedToken:
    """A token from its fields as they are stored."""
    unknown = fields.keys() - {"content", "__type", *FLAGS}
    if unknown or not isinstance(fields.get("content"), str):
        raise ValueError(f"{fields!r} is no token: expected content and {', '.join(FLAGS)}")
    return AddedToken(**{name: value for name, value in fields.items() if name != "__type"})


def _text(path: Path) -> str:
    """A file's text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object."""
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not an object")
    return content
