"""Captions to tokens, in the reader's workers."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jdiff.data.source import BrokenRecord, DataError

if TYPE_CHECKING:
    from jdiff.tokens import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A reader's transform: `caption` -> `tokens`, int32 (S,).

    shuffle_tags: captions are tags joined by ", ", and are put in a new order at every reading, save the first `keep_tags`.
    on_long: what becomes of captions beyond the tokenizer's length: "error" makes the record a broken one, which is listed and
    replaced; "truncate_loudly" cuts it.
    """

    tokenizer: "Tokenizer"
    shuffle_tags: bool = False
    keep_tags: int = 1
    on_long: str = "error"

    def __post_init__(self) -> None:
        if self.on_long not in ("error", "truncate_loudly"):
            raise DataError(
                f"on_long={self.on_long!r}: a batch of captions has one length; use error or truncate_loudly"
            )

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """DataError for a record without a caption."""
        caption = record.get("caption")
        if caption is None:
            raise DataError("this data has no captions, which training on text needs: see jdiff/data/captions.py")
        if self.shuffle_tags:
            tags = caption.split(", ")
            tail = tags[self.keep_tags :]
            caption = ", ".join([*tags[: self.keep_tags], *(tail[i] for i in rng.permutation(len(tail)))])
        try:
            tokens = self.tokenizer([caption], on_long=self.on_long)[0]
        except ValueError as error:
            raise BrokenRecord(f"caption {record['caption']!r}", " ".join(str(error).split())) from error
        return {**record, "tokens": tokens}
