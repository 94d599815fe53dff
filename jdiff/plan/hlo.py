"""The text of a compiled HLO module, as XLA writes it: computations, their instructions, and how often loops run."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
"""Of types whose name does not end in them."""


@dataclass(frozen=True)
class Array:
    """An array's type, as `bf16[32,256]`. near: it lies in a TPU's vector memory, not in HBM."""

    dtype: str
    shape: tuple[int, ...]
    near: bool = False

    @property
    def bytes(self) -> int:
        """Without padding."""
        bits = BITS[self.dtype] if self.dtype in BITS else int(re.sub(r"\D", "", self.dtype.split("e")[0]))
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. arrays: what it makes, several for a tuple. text: the line from its opcode on."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    text: str
    root: bool = False

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return re.findall(r"%([\w.\-]+)", self.text[: _closing(self.text, self.text.index("("))])

    def calls(self, key: str) -> list[str]:
        """Computations that it names as `key=%x` or `key={%x, %y}`."""
        found = re.search(key + r"=(?:%([\w.\-]+)|\{([^}]*)\})", self.text)
        return [] if found is None else [found[1]] if found[1] else re.findall(r"%([\w.\-]+)", found[2])

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate for running it once."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else None

    @property
    def steps(self) -> int | None:
        """Of a kernel's grid, where its metadata says so; what reads a kernel's outputs may have that metadata, too."""
        if self.opcode != "custom-call":
            return None
        found = re.search(r'kernel_metadata=\{[^}]*"steps":"(\d+)"', self.text)
        return int(found[1]) if found else None

    @property
    def asynchronous(self) -> bool:
        """Whether it begins or ends a transfer that runs beside the rest."""
        return self.opcode.endswith(("-start", "-done"))

    @property
    def source(self) -> str:
        """The traced operation that it was made for."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


Computations: TypeAlias = Mapping[str, list[Instruction]]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """A module's computations, and the entry's name; ValueError when there is none."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    text = re.sub(r'\n("|}})', r"\1", text)  # what a kernel says of itself goes over several lines
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            current = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (made := _instruction(line)) is not None:
            current.append(made)
    if entry is None:
        raise ValueError("this text is no HLO module: it has no ENTRY computation")
    return computations, entry


def trips(loop: Instruction, computation: str, computations: Computations) -> int | None:
    """How often the body of a `while` in a computation runs: as the text says, or by the constants that its counter begins at,
    grows by and stays below. None when it says neither."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(known[1])
    outside, inside, condition = (
        {made.name: made for made in computations[name]}
        for name in (computation, *loop.calls("body"), *loop.calls("condition"))
    )
    test, after = (next(made for made in body.values() if made.root) for body in (condition, inside))
    if test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    counter, limit = (condition[name] for name in test.operands)
    before, index = outside.get(loop.operands[0]), re.search(r"index=(\d+)", counter.text)
    if before is None or index is None or not before.opcode == after.opcode == "tuple":
        return None
    first, last = _constant(before.operands[int(index[1])], outside), _constant(limit.name, condition)
    step = _origin(after.operands[int(index[1])], inside)
    steps = [_constant(name, inside) for name in step.operands] if step is not None and step.opcode == "add" else []
    by = next((value for value in steps if value), None)
    return None if first is None or last is None or by is None else max(math.ceil((last - first) / by), 0)


def group(text: str) -> int:
    """How many devices take part together, by `replica_groups`, or the round that `source_target_pairs` make; 1 when neither
    is there.

    It is written as `{{0,1},{2,3}}`, as `[2,2]<=[4]`, or by axes, as `mesh['a'=2,'b'=4] {'b'}`.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(counted[1])
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\S*\))? \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(part or sizes[name]) for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2]))
    if pairs := dict(re.findall(r"\{(\d+),(\d+)\}", text)) if "source_target_pairs" in text else {}:
        first = place = next(iter(pairs))
        for count in range(1, len(pairs) + 1):
            place = pairs.get(place, first)
            if place == first:
                return count
    return 1


def _origin(name: str, computation: dict[str, Instruction]) -> Instruction | None:
    """What makes a value, behind copies of it."""
    made = computation.get(name)
    while made is not None and made.opcode in ("copy", "bitcast"):
        made = computation.get(made.operands[0])
    return made


def _constant(name: str, computation: dict[str, Instruction]) -> int | None:
    """An integer constant's value; None of anything else."""
    made = _origin(name, computation)
    found = re.match(r"constant\((-?\d+)\)", made.text) if made is not None else None
    return int(found[1]) if found else None


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
    if found is None:
        return None
    rest = found[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    arrays = tuple(
        Array(dtype, tuple(int(n.lstrip("<=")) for n in shape.split(",") if n), "S(1)" in layout)
        for dtype, shape, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", rest[:end])
    )
    text = rest[end:].strip()
    return Instruction(found[2], text[: text.index("(")], arrays, text, found[1] is not None)


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"a bracket is not closed: {text[:80]!r}")
