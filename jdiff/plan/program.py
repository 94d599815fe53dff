"""What a compiler says of a program: the text of a compiled HLO module, read.

XLA:TPU writes an estimate of its cycles beside each instruction that it schedules. A loop's body stands in the text once; here it
counts as often as it runs. Instructions without an estimate (kernels, copies that run on their own, collectives) are
counted, so that it can be said what share of the program an estimate speaks for.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from jdiff.plan import bundles, hlo
from jdiff.plan.hlo import Array, Instruction
from jdiff.plan.kernels import SHARE, kernel_flops

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota")
)
"""Opcodes that do nothing when the program runs."""
VIEW = 'custom_call_target="ConcatBitcast"'
"""XLA:TPU's name for slices that were copied side by side, as one array."""


@dataclass(frozen=True)
class Scheduled:
    """An instruction that runs by itself, `repeats` times, in a computation. estimate: cycles of one run, if there is one."""

    instruction: Instruction
    repeats: int
    computation: str
    estimate: int | None

    @property
    def cycles(self) -> int:
        """Of all its runs; 0 without an estimate."""
        return self.repeats * (self.estimate or 0)


@dataclass(frozen=True)
class Collective:
    """A transfer between devices, done `repeats` times. bytes: of the whole array, as it is before or after being split over
    the `group` devices that take part, whichever is larger."""

    kind: str
    bytes: int
    group: int
    repeats: int
    source: str


class Program:
    """A module's text, such as `compiled.as_text()`; ValueError when there is no entry computation in it.

    schedules: of jdiff's own kernels, by `bundles.collect`, for a chip that reads so many bytes of HBM in a cycle.
    """

    def __init__(self, text: str, schedules: Mapping[str, int] | None = None, bytes_per_cycle: float = math.inf):
        self.computations, self.entry = hlo.parse(text)
        self.schedules, self.bytes_per_cycle = schedules or {}, bytes_per_cycle

    @cached_property
    def _walked(self) -> tuple[list[Scheduled], list[str]]:
        unknown: list[str] = []
        return list(self._walk(self.entry, 1, unknown)), unknown

    @property
    def scheduled(self) -> list[Scheduled]:
        """All that runs by itself, in loops as often as it runs there."""
        return self._walked[0]

    @property
    def unknown_loops(self) -> list[str]:
        """Loops whose length the text does not say; they are counted as running once."""
        return self._walked[1]

    def _walk(self, computation: str, repeats: int, unknown: list[str]) -> Iterator[Scheduled]:
        for made in self.computations[computation]:
            if made.opcode == "while":
                count = hlo.trips(made, computation, self.computations)
                if count is None:
                    unknown.append(made.source or made.name)
                yield from self._walk(made.calls("body")[0], repeats * (1 if count is None else count), unknown)
            elif made.opcode in ("call", "async-start", "conditional"):
                for key in ("to_apply", "calls", "branch_computations", "true_computation", "false_computation"):
                    for name in made.calls(key):
                        yield from self._walk(name, repeats, unknown)
            elif made.opcode not in FREE and VIEW not in made.text:
                yield Scheduled(made, repeats, computation, self._estimate(made, computation))

    def _estimate(self, made: Instruction, computation: str) -> int | None:
        if made.steps is None:
            return made.cycles
        read = dict(self._inputs(made, computation)).values()  # of one that is given twice each time a part
        far = sum(array.bytes for array in (*made.arrays, *read) if not array.near)
        return bundles.cycles(made.name, made.steps, far, self.schedules, self.bytes_per_cycle)

    def _inputs(self, made: Instruction, computation: str) -> list[tuple[str, Array]]:
        types = {other.name: other.arrays for other in self.computations[computation]}
        return [(name, array) for name in made.operands for array in types[name][:1]]

    @property
    def cycles(self) -> int:
        """The sum of all estimates."""
        return sum(made.cycles for made in self.scheduled)

    @cached_property
    def kernels(self) -> dict[int, int]:
        """Place in `scheduled` -> FLOPs of all its runs, of the kernels that are known (`kernels.py`)."""
        found: dict[int, int] = {}
        for place, made in enumerate(self.scheduled):
            if made.instruction.opcode == "custom-call":
                operands = [array for _, array in self._inputs(made.instruction, made.computation)]
                flops = kernel_flops(made.instruction.name, operands)
                if flops is not None:
                    found[place] = made.repeats * flops
        return found

    def kernel_cycles(self, flops_per_cycle: float) -> int:
        """Those of the known `kernels`, which have no estimate, at `kernels.SHARE` of a chip's peak."""
        return math.ceil(sum(self.kernels.values()) / (SHARE * flops_per_cycle))

    @property
    def _estimable(self) -> Iterator[Scheduled]:
        """What computes, and is no kernel that is counted otherwise."""
        for place, made in enumerate(self.scheduled):
            if not made.instruction.asynchronous and place not in self.kernels:
                yield made

    @property
    def share_estimated(self) -> float:
        """The share that carries an estimate, by the bytes that all runs write; of what computes, not of what only moves arrays
        beside the rest (`asynchronous`), and without the known `kernels`."""
        known, total = 0, 0
        for made in self._estimable:
            size = made.repeats * sum(array.bytes for array in made.instruction.arrays)
            known += size * (made.estimate is not None)
            total += size
        return known / max(total, 1)

    @property
    def not_estimated(self) -> Counter[str]:
        """Opcode -> how many runs have no estimate; custom calls with their target."""
        found: Counter[str] = Counter()
        for made in self._estimable:
            if made.estimate is None:
                target = re.search(r'custom_call_target="([^"]*)"', made.instruction.text)
                found[f"{made.instruction.opcode} {target[1]}" if target else made.instruction.opcode] += made.repeats
        return found

    def hottest(self, count: int = 20) -> list[Scheduled]:
        """The instructions with the most cycles."""
        return sorted(self.scheduled, key=lambda made: -made.cycles)[:count]

    @cached_property
    def collectives(self) -> list[Collective]:
        """Transfers between devices, in the forms that XLA:TPU gives them too: a reduce-scatter is a fusion of that name; what is
        gathered for a product, or scattered of one, may be passed round piece by piece in a loop of products, `windowed`; and
        what is begun, stepped on and ended within fusions is one transfer, where it is begun. What an unrolled loop moves has one
        channel, however often it runs."""
        found: list[Collective] = []
        begun: set[str] = set()
        for made in self.scheduled:
            fusion = made.instruction.opcode == "fusion"
            scatter = fusion and "all-reduce-scatter" in made.instruction.text
            starts = scatter or made.instruction.name.startswith("async-collective-start")
            bodies = [made.instruction]
            for name in made.instruction.calls("calls") if fusion else []:
                bodies += self._nested(name)
            for inner in bodies:
                kind = inner.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                channel = re.search(r"channel_id=(\d+)", inner.text)
                if fusion and channel and channel[1] in begun and not starts:
                    continue
                if channel:
                    begun.add(channel[1])
                kind = "reduce-scatter" if scatter and kind == "all-reduce" else kind
                if kind == "collective-permute" and "windowed_dot_general" in made.computation:
                    kind = "reduce-scatter" if re.search(r"_rs\b", made.computation) else "all-gather"
                found.append(self._collective(kind, inner, made))
        return found

    def _nested(self, computation: str) -> Iterator[Instruction]:
        for made in self.computations[computation]:
            yield made
            for name in made.calls("calls") if made.opcode == "fusion" else []:
                yield from self._nested(name)

    def _collective(self, kind: str, made: Instruction, scheduled: Scheduled) -> Collective:
        """An asynchronous start makes (inputs, outputs, semaphores); all arrays of one side are what is moved."""
        sizes = [array.bytes for array in made.arrays if array.shape or not made.opcode.endswith("-start")]
        total = sum(sizes[len(sizes) // 2 :]) if made.opcode.endswith("-start") and len(sizes) > 1 else sum(sizes)
        group = hlo.group(made.text)
        if kind == "reduce-scatter" and made.opcode.startswith("reduce-scatter"):
            total *= group
        return Collective(kind, total, group, scheduled.repeats, made.source or scheduled.instruction.source)

    @property
    def products(self) -> Counter[tuple[str, str, str]]:
        """(left, right, result) types of all matrix products and convolutions, wherever they stand in the text, each once."""
        found: Counter[tuple[str, str, str]] = Counter()
        for body in self.computations.values():
            types = {made.name: made.arrays[0].dtype for made in body if made.arrays}
            for made in body:
                if made.opcode in ("dot", "convolution"):
                    left, right = (types[name] for name in made.operands[:2])
                    found[left, right, made.arrays[0].dtype] += 1
        return found
