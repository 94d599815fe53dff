"""Speed of jdiff beside its peer, measured so that the ratio can be believed.

    python tools/bench.py dit [--batch 8] [--rounds 9] [--only train] [--json FILE]
    python tools/bench.py sd [--batch 2] [--rounds 5] [--only unet,vae]
    python tools/bench.py vae [--rounds 5]
    python tools/bench.py lora [--batch 2] [--rounds 5] [--only full,step]
    python tools/bench.py int8 [--batch 8] [--rounds 5] [--only w8a8,w8,tpu]
    python tools/bench.py growth [--rounds 3] [--only image_size,depth,width,batch,devices] [--plot FILE]
    python tools/bench.py data [--source imagefolder --path FOLDER] [--batch 64] [--step-ms 100]
    python tools/bench.py convert [--model DiT-XL/2] [--rounds 3] [--only load,rewrite,formats]
    python tools/bench.py compile [--model DiT-XL/2] [--only command,step]
    python tools/bench.py tpu [--only dit,unet]

Each case makes both sides from one set of random weights, asserts that they compute the same, warms both up, each in a process
of its own, and then runs them in turn (A B A B ...), so that whatever else the machine does falls on both. One JSON line a case
gives medians and minima in milliseconds, their ratios jdiff / peer (below 1 jdiff is the quicker), and each side's peak memory.
The peer on a CPU is PyTorch in eager mode with diffusers' own modules, schedulers and the fused AdamW; of int8 it is jdiff
itself in fp32, or bf16 by XLA:TPU's estimate. `others` is the share of the machine's processors that went to other processes
meanwhile: above 0.05 the figures are no measurement, and a line says so.

`--check docs/performance.jsonl` ends with an error where a ratio is above what is recorded there for this kind of processor by
more than the noise of both.

A case is a file in tools/benchmarks/, registered in `CASES`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator

import jax
from benchmarks import conversion, data, dit, growth, int8, lora, record, sd, start, tpu
from benchmarks.timing import Row

from jdiff import runtime


def machine() -> Row:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            facts = dict(x.split(":", 1) for x in file.read().replace("\t", "").split("\n") if ":" in x)
        vectors = [name for name in ("avx512f", "avx2") if name in facts.get("flags", "").split()]
        model = ", ".join([facts.get("model name", model).strip(), *vectors[:1]])
    libraries = ("jax", "jaxlib", "flax", "torch", "diffusers")
    return {
        "device": str(jax.devices()[0].device_kind),
        "processor": f"{os.cpu_count()} x {model}",
        "load": round(os.getloadavg()[0], 2),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


def report(rows: list[Row]) -> None:
    """The rows as a small table."""
    known = (
        "jdiff_ms",
        "torch_ms",
        "fp32_ms",
        "ratio",
        "ratio_min",
        "images_per_s",
        "quicker",
        "growth",
        "memory_share",
        "mfu",
        "waits",
        "others",
    )
    columns = [key for key in known if any(key in row for row in rows)]
    print(" | ".join(["case".ljust(28), *(key.rjust(9) for key in columns)]))
    for row in rows:
        print(" | ".join([row["case"].ljust(28), *(str(row.get(key, "")).rjust(9) for key in columns)]))
    if any(row.get("others", 0) > 0.05 for row in rows):
        print("other processes took more than 5 % of the machine: measure again when it is quiet", file=sys.stderr)


CASES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "dit": dit.dit,
    "sd": sd.sd,
    "vae": sd.vae,
    "lora": lora.lora_steps,
    "int8": int8.int8,
    "growth": growth.growth,
    "data": data.data,
    "convert": conversion.conversions,
    "compile": start.start,
    "tpu": tpu.tpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--batch", type=int, help="rows (default: 2 for sd and lora, else 8)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="append the lines to this file")
    parser.add_argument("--check", metavar="FILE", help="fail where a ratio falls behind those that --json wrote there")
    parser.add_argument("--plot", metavar="FILE", help="growth: a picture of it")
    parser.add_argument("--only", default="", help="some of a case's parts, by comma")
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--tpu-model", default="DiT-XL/2", help="int8: what is compiled for a v5e, where libtpu is")
    parser.add_argument("--steps", type=int, default=10, help="dit: DDIM steps")
    parser.add_argument("--source", default="openmoji")
    parser.add_argument("--path", help="data: the source's folder; convert: where there is room for a model")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=100.0)
    args = parser.parse_args()
    if args.plot and args.case != "growth":
        parser.error("--plot draws growth alone")
    args.batch = args.batch or {"sd": 2, "lora": 2}.get(args.case, 8)
    # as launch.py does on a CPU, and tools/sample.py
    least = 1 if args.case in ("sd", "int8") else runtime.LEAST_ROWS
    args.shape = {}  # of the model, where a case changes it
    args.devices = runtime.cpu_devices(args.batch, least=least)
    runtime.prepare(args.devices)
    lines, rows = [machine()], []
    print(json.dumps(lines[0]), flush=True)
    for row in CASES[args.case](args):
        rows.append(row)
        print(json.dumps(row), flush=True)
    lines += rows
    if args.json:
        with open(args.json, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    report(rows)
    if args.plot:
        growth.plot(rows, args.plot)
    if args.check:
        with open(args.check) as file:
            recorded = [json.loads(line) for line in file]
        try:
            slower = record.behind(rows, recorded, lines[0]["processor"])
        except LookupError as error:
            sys.exit(str(error))
        if slower:
            sys.exit("behind what is recorded: " + "; ".join(slower))


if __name__ == "__main__":
    main()
