"""Training speed alone and beside programs that keep cores busy, by number of threads.

    python scripts/bench_busy.py                       # 12 steps of `train dpo --preset tiny` a row, about two minutes
    python scripts/bench_busy.py --demo                # all of `make demo`, both ways: about ten minutes
    python scripts/bench_busy.py --busy 2              # two busy programs, for a machine of four cores

`auto` is the command's own choice; the other rows set OMP_NUM_THREADS. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEP = """
import json, sys, time
from diffusion_align.train import record
times = []
record.recorder = lambda path: lambda row: times.append((time.perf_counter(), row["threads"]))
from diffusion_align.cli import main
assert main(sys.argv[1:]) == 0
print(json.dumps({"seconds": [b[0] - a[0] for a, b in zip(times, times[1:])], "threads": times[-1][1]}))
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """`count` programs that each keep a core busy."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def run(argv: list[str], threads: int | None) -> str:
    """The last line that a command prints, with `threads` threads or its own choice."""
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run([sys.executable, *argv], env=env, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1]


def step_seconds(threads: int | None, steps: int, folder: Path) -> tuple[float, int]:
    """The median seconds of a training step, and the number of threads at the end."""
    name = f"{threads}-{time.monotonic_ns()}"
    flags = f"train dpo --preset tiny --max_train_steps {steps + 1} --run_validation=false --checkpointing_steps 10000"
    places = ["--cache_dir", str(folder / "cache"), "--output_dir", str(folder / name)]
    found = json.loads(run(["-c", STEP, *flags.split(), *places], threads))
    return statistics.median(found["seconds"]), int(found["threads"])


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Print a table of seconds and ratios; {"auto": [alone, beside], ...}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, help="programs that keep a core busy each")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--demo", action="store_true", help="time the whole demo, with the command's own choice only")
    args = parser.parse_args(argv)
    choices: list[int | None] = [None] if args.demo else [None, 1, os.cpu_count() or 1]
    rows: dict[str, list[float]] = {}
    what = "demo, s" if args.demo else "step, s"
    print(f"| threads | {what}, alone | beside {args.busy} busy | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for choice in choices:
            found, used = [], []
            for busy in (0, args.busy):
                with neighbours(busy):
                    if args.demo:
                        begun = time.monotonic()
                        run([str(HERE / "demo.py"), "--output_dir", str(folder / f"demo-{busy}")], None)
                        found.append(time.monotonic() - begun)
                    else:
                        seconds, threads = step_seconds(choice, args.steps, folder)
                        found.append(seconds)
                        used.append(threads)
            name = "auto" if choice is None else str(choice)
            rows[name] = found
            shown = f"{name} ({', then '.join(map(str, used))})" if used and choice is None else name
            print(f"| {shown} | {found[0]:.2f} | {found[1]:.2f} | {found[1] / found[0]:.2f} |", flush=True)
    return rows


if __name__ == "__main__":
    main()
