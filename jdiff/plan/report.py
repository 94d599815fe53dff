"""Plans as text, and as JSON."""

import dataclasses
import json
from pathlib import Path

from jdiff.plan import kernels
from jdiff.plan.training import Plan


def describe(plan: Plan) -> str:
    """A plan as text, for people."""
    gib = lambda n: f"{n / 2**30:.2f} GiB"  # noqa: E731
    mesh = " x ".join(f"{key} {size}" for key, size in plan.mesh.items())
    spare = plan.memory - plan.total
    lines = [
        f"{plan.title} on {plan.topology} as {mesh}: {plan.parameters:,} parameters, {plan.trained:,} trained, {plan.precision}, "
        f"batch {plan.batch_size} in {plan.accumulate} part(s) ({plan.basis})",
        f"memory      {gib(plan.total)} of {gib(plan.memory)} a device: "
        + (f"fits, {gib(spare)} spare" if plan.fits else f"does not fit, {gib(-spare)} too much"),
        "            " + ", ".join(f"{key} {gib(size)}" for key, size in (*plan.state.items(), ("batch", plan.batch))),
        f"            activations, gradients and scratch {gib(plan.temporary)}",
        f"model FLOPs {plan.model_flops:.4g} a step, {plan.model_flops / plan.devices:.4g} a device",
    ]
    if plan.seconds is not None and plan.mfu is not None:
        speed = f"{plan.seconds * 1e3:.1f} ms a step, {plan.batch_size / plan.seconds:.1f} pictures/s"
        lines.append(f"time        {speed}, MFU {plan.mfu:.1%}, no transfers counted")
    if plan.kernel_cycles and plan.cycles:
        share = f"{plan.kernel_cycles / plan.cycles:.1%} of it in attention's kernels"
        lines.append(f"            {share}, which have no estimate: taken at {kernels.SHARE:.0%} of peak")
    if plan.share_estimated is not None:
        rest = ", ".join(
            f"{count} {opcode}" for opcode, count in sorted(plan.not_estimated.items(), key=lambda x: -x[1])[:6]
        )
        lines.append(
            f"            estimates cover {plan.share_estimated:.1%} of what is written; without one run: {rest}"
        )
    lines += [f"            a loop of unknown length is counted once: {name}" for name in plan.unknown_loops]
    for moved in plan.transfers:
        wanted = "none is needed" if moved.ideal is None else f"ideal {moved.ideal / 1e9:.3f} GB"
        lines.append(
            f"{moved.kind:<18} {moved.runs:>6} runs over {moved.group} devices, {moved.bytes / 1e9:.3f} GB; {wanted}"
        )
    lines.append(f"compiled in {plan.compile_seconds:.1f} s")
    return "\n".join(lines)


def write_json(plans: list[Plan], path: Path) -> None:
    """The plans as a JSON list."""
    path.write_text(json.dumps([{**dataclasses.asdict(made), "fits": made.fits} for made in plans], indent=1) + "\n")
