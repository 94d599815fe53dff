"""The guards against failures that others' users met, each taken out of a copy of the tree: the test that is named must fail.

    python tests/faults/mutations.py [NAME ...]

`pytest -m faults` runs it too. A row is a failure's number and name, the file and line that guard against it, what stands there
without the guard, and the test.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
KEPT = ("jdiff", "tests", "tools", "configs", "docs", "launch.py", "pyproject.toml")


@dataclasses.dataclass(frozen=True)
class Guard:
    """`old`, which is in `file` once, becomes `new`; `test` must fail then."""

    name: str
    file: str
    old: str
    new: str
    test: str


GUARDS = (
    Guard(
        "1 strided arrays are written in C order",
        "jdiff/convert/arrays.py",
        'numbers(x).astype(dtype, order="C", copy=False)',
        "numbers(x).ravel('K').reshape(x.shape).astype(dtype, copy=False)",
        "tests/faults/test_guards.py::test_strided_arrays_are_written_as_what_they_are",
    ),
    Guard(
        "2 a deeper model restores no shallower one",
        "jdiff/checkpoint.py",
        "    if expected != found:\n",
        "    if expected != found and False:\n",
        "tests/faults/test_guards.py::test_a_deeper_model_restores_no_shallower_one",
    ),
    Guard(
        "3 a restore casts nothing",
        "jdiff/tree.py",
        'return f"{leaf.dtype}[',
        'return f"[',
        "tests/test_checkpoint.py::test_another_model_is_an_error_that_changes_nothing",
    ),
    Guard(
        "4 a missing weight is not filled in",
        "jdiff/convert/engine.py",
        "    missing = [name for name in names if name not in arrays]",
        "    missing = []",
        "tests/test_convert.py::test_every_mutation_of_every_array_is_refused",
    ),
    Guard(
        "5 a LoRA that fits nothing is refused",
        "jdiff/convert/lora.py",
        "    if landing.problems",
        "    if False and landing.problems",
        "tests/test_convert_lora.py::test_a_file_for_another_model_says_how_little_fits",
    ),
    Guard(
        "6 a LoRA's alpha counts",
        "jdiff/convert/lora_file.py",
        'scale = 1.0 if alpha is None else float(alpha.reshape(())) / len(parts["a"])',
        "scale = 1.0",
        "tests/test_convert_lora.py::test_alphas_beside_diffusers_names_count",
    ),
    Guard(
        "7 the average is not taken for the raw parameters",
        "jdiff/train.py",
        'for name in ("params", "frozen", "ema_params"))',
        'for name in ("ema_params", "frozen", "ema_params"))',
        "tests/test_text_to_image.py::test_a_resumed_run_equals_an_uninterrupted_one",
    ),
    Guard(
        "8 a failed save is told",
        "jdiff/checkpoint.py",
        '        except Exception as error:\n            raise CheckpointError(\n                f"a checkpoint in',
        '        except ZeroDivisionError as error:\n            raise CheckpointError(\n                f"a checkpoint in',
        "tests/faults/test_disk.py::test_a_failed_save_is_told_and_spares_the_one_before",
    ),
    Guard(
        "9 a checkpoint that is not durable does not count",
        "jdiff/checkpoint.py",
        "[int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir()]",
        "[int(p.name.split('.')[0]) for p in folder.iterdir() if p.is_dir()]",
        "tests/test_checkpoint.py::test_an_unfinished_save_does_not_count_and_is_cleared",
    ),
    Guard(
        "10 a signal is heard while compiling",
        "jdiff/interrupt.py",
        "for s in (signal.SIGTERM, signal.SIGINT)}",
        "for s in (signal.SIGINT,)}",
        "tests/test_train.py::test_a_signal_while_compiling_saves_too",
    ),
    Guard(
        "10 a signal is heard while scoring",
        "jdiff/interrupt.py",
        "            if self.caught is not None:\n                raise Left\n",
        "",
        "tests/faults/test_guards.py::test_a_signal_while_scoring_saves_at_once_and_scores_at_the_next_start",
    ),
    Guard(
        "11 a resumed run neither repeats nor reshuffles",
        "jdiff/data/reader.py",
        "step, broken = self.first + index, []",
        "step, broken = index, []",
        "tests/test_data.py::test_rows_do_not_depend_on_workers_processes_or_where_a_run_resumes",
    ),
    Guard(
        "12 noise does not depend on devices",
        "jdiff/train.py",
        "jnp.arange(rows))",
        "jnp.arange(rows) // len(jax.devices()))",
        "tests/test_train.py::test_noise_depends_on_seed_step_and_row_alone",
    ),
    Guard(
        "13 a process that is stuck is told from one that works",
        "jdiff/processes.py",
        "if now - heard > self.lost_after and index not in self.ended:",
        "if False:",
        "tests/test_processes.py::test_a_lost_process_is_named_and_the_run_goes_on[1]",
    ),
    Guard(
        "14 a picture of NaN is not written",
        "jdiff/pipelines/pictures.py",
        "if not np.isfinite(x_BHWC).all():",
        "if False:",
        "tests/faults/test_guards.py::test_a_picture_of_nan_is_an_error",
    ),
    Guard(
        "15 a download is held against its hash",
        "jdiff/convert/hub.py",
        "        if digest != name:",
        "        if False:",
        "tests/test_convert_tool.py::test_a_wrong_hash_is_refused",
    ),
    Guard(
        "a flipped bit is found",
        "jdiff/checkpoint.py",
        '        if value != meta["checksums"][path]:',
        "        if False:",
        "tests/test_checkpoint.py::test_a_forged_array_is_found_by_its_checksum",
    ),
    Guard(
        "a step that is not finite changes nothing",
        "jdiff/train.py",
        "jnp.where(fine, new, old)",
        "jnp.where(True, new, old)",
        "tests/test_train.py::test_a_step_that_is_not_finite_changes_nothing",
    ),
    Guard(
        "a state that is not finite is never written",
        "jdiff/checkpoint.py",
        "if bad := tree.not_finite(dict(items)):",
        "if bad := []:",
        "tests/test_checkpoint.py::test_a_state_that_is_not_finite_is_never_written",
    ),
    Guard(
        "a clock that jumps ends no save",
        "jdiff/checkpoint.py",
        "timeout_secs=PATIENCE",
        "timeout_secs=1200",
        "tests/faults/test_disk.py::test_a_jumping_clock_changes_nothing",
    ),
    Guard(
        "a clock that jumps ends no making of folders",
        "jdiff/checkpoint.py",
        "create_directories_asynchronously=False",
        "create_directories_asynchronously=True",
        "tests/faults/test_disk.py::test_a_jumping_clock_changes_nothing",
    ),
    Guard(
        "a pickle calls nothing that is not on the list",
        "jdiff/convert/pickles.py",
        "or key not in self.names:",
        "or False:",
        "tests/test_convert_hostile.py::test_a_hostile_pickle_is_refused",
    ),
    Guard(
        "a quantized copy is held against its hash",
        "jdiff/convert/quantized.py",
        '!= content["sha256"][file.name]:',
        "is None:",
        "tests/test_quantized.py::test_a_damaged_copy_is_one_line",
    ),
    Guard(
        "what is written appears whole",
        "jdiff/paths.py",
        'partial = dest.with_name(f".{dest.name}.partial")',
        "partial = dest",
        "tests/faults/test_guards.py::test_a_file_appears_whole_or_not_at_all",
    ),
)


def survives(guard: Guard) -> str:
    """What is wrong: the test still passes without the guard, or could not be run. Empty when the test fails, as it must."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        for name in KEPT:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, Path(folder) / name)
        file = Path(folder) / guard.file
        text = file.read_text()
        if text.count(guard.old) != 1:
            return f"{guard.file} has {guard.old!r} {text.count(guard.old)} times, not once: the row is out of date"
        file.write_text(text.replace(guard.old, guard.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", guard.test]
        environment = {**os.environ, "PYTHONPATH": folder}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode == 1 or done.returncode < 0:  # failed, or ended by a signal: donating one array twice is a crash
        return ""
    return f"{guard.test} ended with {done.returncode}: {done.stdout[-800:]}"


def main() -> int:
    """Prints a line a guard; the exit code says whether all tests failed."""
    wrong = 0
    for guard in GUARDS:
        if sys.argv[1:] and not any(name in guard.name for name in sys.argv[1:]):
            continue
        problem = survives(guard)
        wrong += bool(problem)
        print(f"{guard.name} | {guard.file} | {guard.test} | {problem or 'fails without it'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
