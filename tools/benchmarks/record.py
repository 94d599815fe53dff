"""What was measured before, as `--json` wrote it, and whether a run falls behind it."""

import math

from benchmarks.timing import Row

LEAST_NOISE = 0.05
"""Of a ratio, where both sides ran evenly: the same build differs by so much from hour to hour."""


def behind(rows: list[Row], recorded: list[Row], processor: str) -> list[str]:
    """A line for each row whose ratio is above the newest recorded on such a processor by more than the noise of both.

    LookupError where none of the rows is recorded there, since then nothing was checked.
    """
    newest, here = {}, False
    for line in recorded:
        here = line["processor"] == processor if "processor" in line else here
        if here and "ratio" in line:
            newest[line["case"]] = line
    both = [(row, newest[row["case"]]) for row in rows if row["case"] in newest]
    if not both:
        raise LookupError(f"nothing is recorded of {', '.join(row['case'] for row in rows)} on {processor}")
    lines = []
    for row, before in both:
        allowed = before["ratio"] * (1 + max(LEAST_NOISE, _noise(row) + _noise(before)))
        if row["ratio"] > allowed:
            lines.append(f"{row['case']}: {row['ratio']}, recorded {before['ratio']}, with the noise {allowed:.3f}")
    return lines


def _noise(row: Row) -> float:
    """By how much the sides' medians are above their least together."""
    sides = [name.removesuffix("_min_ms") for name in row if name.endswith("_min_ms")]
    return math.prod(row[f"{side}_ms"] / row[f"{side}_min_ms"] for side in sides) - 1
