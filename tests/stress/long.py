"""Long runs of `train dpo` and `train d3po`: neither what a run holds nor what a step costs may grow with its length.

    python tests/stress/long.py [--steps 1000] [--model tiny]

Each is the real command in a separate process, with checkpoints, sample grids, the collapse alarm and metrics.jsonl.
Resident memory, file descriptors, threads and Python objects are compared between one tenth of the steps and the end,
after a garbage collection and malloc_trim. Processor time and bytes read and written a step are compared between the
second tenth and the last; they would grow if a step read the whole record again. It needs /proc and malloc_trim.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusion_align import cli
from diffusion_align.shapes import sample_captions
from diffusion_align.train import record

ASSETS = Path(__file__).resolve().parents[2] / "assets"
METHODS = ("dpo", "d3po")
# The largest growth allowed. Processor time depends on what else the machine does, bytes do not.
MEMORY, SECONDS, BYTES, OBJECTS = 1.01, 2.0, 1.05, 40


@dataclass(frozen=True)
class Mark:
    """What a process holds after a step, and what it has used so far."""

    step: int
    memory: int
    files: int
    threads: int
    objects: int
    seconds: float
    moved: int


def mark(step: int) -> Mark:
    seconds, moved = time.process_time(), _moved()  # before the collection, which is not part of the run
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Mark(
        step,
        pages * resource.getpagesize(),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(gc.get_objects()),
        seconds,
        moved,
    )


def _moved() -> int:
    lines = [line.split() for line in Path("/proc/self/io").read_text().splitlines()]
    return sum(int(number) for name, number in lines if name in ("rchar:", "wchar:"))


def arguments(method: str, steps: int, model: str, folder: Path) -> list[str]:
    """The command line; it saves and draws often enough to have done both before the first mark."""
    every = max(1, steps // 20)
    (folder / "prompts.txt").write_text("\n".join(sample_captions(6, 0, unique=True)))
    common = f"""train {method} --model {model} --output_dir {folder / "run"} --device cpu --learning_rate 1e-5
        --checkpointing_steps {every} --checkpoints_total_limit 2 --validation_steps {every} --run_validation
        --validation_sampling_steps 2 --validation_prompt circle --collapse_alarm warn""".split()
    own = {
        "dpo": f"--data {ASSETS / 'tiny_pairs.parquet'} --cache_dir {folder / 'cache'} --max_train_steps {steps}"
        " --max_train_samples 16 --train_batch_size 1",
        "d3po": f"--prompts {folder / 'prompts.txt'} --reward random --steps 3 --prompts_per_round 1 --sample_chunk 2"
        f" --num_rounds {steps}",
    }[method].split()
    return [*common, *own]


def marks(command: list[str], wanted: list[int]) -> list[Mark]:
    """Run the command in this process, and take a mark after each of the `wanted` steps."""
    found: list[Mark] = []
    append: Callable[..., None] = record.append

    def marking(path: str | os.PathLike[str], row: dict[str, object]) -> None:
        append(path, row)
        if row["step"] in wanted:
            found.append(mark(int(str(row["step"]))))

    record.append = marking
    try:
        code = cli.main(command)
    finally:
        record.append = append
    if code or [one.step for one in found] != wanted:
        raise RuntimeError(f"the run ended with {code} after the marks at {[one.step for one in found]}")
    return found


def in_new_process(method: str, steps: int, model: str) -> list[Mark]:
    """`marks` in a new process, so that nothing of an earlier run is counted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", method, "--folder", folder]
        command += ["--steps", str(steps), "--model", model]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"train {method} failed:\n{ran.stderr[-2000:]}")
        return [Mark(**one) for one in json.loads(ran.stdout.splitlines()[-1])]


@dataclass(frozen=True)
class Growth:
    """From the first mark to the last: ratio of memory and differences; costs are of the last tenth over the second."""

    memory: float
    files: int
    threads: int
    objects: int
    seconds: float
    moved: float

    def is_bounded(self) -> bool:
        return (
            self.memory <= MEMORY
            and self.files <= 0
            and self.threads <= 0
            and self.objects <= OBJECTS
            and self.seconds <= SECONDS
            and self.moved <= BYTES
        )


def growth(found: list[Mark]) -> Growth:
    first, second, before, last = found
    steps = (second.step - first.step) / (last.step - before.step)  # the windows may differ by a step
    return Growth(
        last.memory / first.memory,
        last.files - first.files,
        last.threads - first.threads,
        last.objects - first.objects,
        (last.seconds - before.seconds) / (second.seconds - first.seconds) * steps,
        (last.moved - before.moved) / (second.moved - first.moved) * steps,
    )


def four(steps: int) -> list[int]:
    """The steps to mark: the ends of the first, the second, the last but one and the last tenth."""
    return [steps // 10, steps // 5, steps - steps // 10, steps]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--one", choices=METHODS, help="run this one here and print its marks as JSON")
    parser.add_argument("--folder", type=Path, help="where --one writes")
    args = parser.parse_args(argv)
    if args.one:
        found = marks(arguments(args.one, args.steps, args.model, args.folder), four(args.steps))
        print(json.dumps([asdict(one) for one in found]))
        return 0
    bad = 0
    for method in METHODS:
        begun = time.monotonic()
        found = in_new_process(method, args.steps, args.model)
        grown, first, last = growth(found), found[0], found[-1]
        print(
            f"train {method}, step {first.step} to {last.step}: memory {first.memory / 2**20:.1f} to "
            f"{last.memory / 2**20:.1f} MiB ({100 * (grown.memory - 1):+.2f} %), files {first.files} to {last.files}, "
            f"threads {first.threads} to {last.threads}, objects {grown.objects:+d}; a step of the last tenth costs "
            f"{grown.seconds:.2f} of the time and {grown.moved:.2f} of the bytes of one of the second; "
            f"{time.monotonic() - begun:.0f} s",
            flush=True,
        )
        bad += not grown.is_bounded()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
