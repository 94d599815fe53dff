"""From labels, texts and pictures to pictures."""

from jdiff.pipelines.classes import ClassPipeline
from jdiff.pipelines.pictures import from_uint8, grid, save_png, to_uint8
from jdiff.pipelines.rows import gather, place
from jdiff.pipelines.text import TextPipeline

__all__ = ["ClassPipeline", "TextPipeline", "from_uint8", "gather", "grid", "place", "save_png", "to_uint8"]
