"""Stops training runs at every step, resumes them, and compares every bit with the run that was never stopped.

    python tests/stress/resume.py [--smoke]

- each method x LoRA or full x 1 or 4 micro-batches a step x with or without an average of the weights: stopped by a
  signal after each of 11 steps, in the middle of epochs and of rounds, and resumed
- three stops within one epoch
- resumed with another number of loader workers
- SIGTERM, SIGINT and SIGUSR1 at random moments, in a separate process: exit code 128 + n, a checkpoint no older than
  one step, and the same end
- changes that a resumed run must refuse, naming both values
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `stress` and of the tests' helpers

import torch

from stress.runs import METHODS, STEPS, differences, end_of, flags, make_world, stop_at, train

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SETUPS = tuple(itertools.product(METHODS, ("lora", "full"), (1, 4), (False, True)))
# What may not change, and the words of the refusal.
CHANGES = {
    "--seed=1": "seed was 0 and is now 1",
    "--rank=8": "rank was 4 and is now 8",
    "--learning_rate=2e-3": "learning_rate was 0.001 and is now 0.002",
    "--resolution=32": "resolution was",
    "--max_grad_norm=2": "max_grad_norm was 1.0 and is now 2.0",
    "--mixed_precision=bf16": "mixed_precision was 'no' and is now 'bf16'",
    "--lora_targets=wide": "lora_targets was 'attention' and is now 'wide'",
    "--skip_spikes=9": "skip_spikes was None and is now 9.0",
    "--adam_beta2=0.9": "adam_beta2 was 0.999 and is now 0.9",
}


def resumed(world: Path, run: Path, setup: tuple[str, str, int, bool], stops: list[int], *more: str) -> list[str]:
    """Run with these stops, then to the end; return what went wrong on the way."""
    method, mode, pieces, ema = setup
    argv = flags(world, method, run, mode=mode, pieces=pieces, ema=ema)
    for number, stop in enumerate([*stops, None]):
        again = ["--resume=latest", *more] if number else []
        code, said = train([*argv, *again], None if stop is None else stop_at(stop))
        if code != (0 if stop is None else 128 + signal.SIGTERM):
            return [f"{setup}, stopped at {stops}: exit code {code}: {said.splitlines()[-1] if said else ''}"]
    return []


def uninterrupted(world: Path, setup: tuple[str, str, int, bool]) -> Path:
    """The folder of the uninterrupted run, which is made once."""
    run = world / ("whole-" + "-".join(map(str, setup)))
    if run.exists():
        return run
    method, mode, pieces, ema = setup
    code, said = train(flags(world, method, run, mode=mode, pieces=pieces, ema=ema))
    if code:
        raise RuntimeError(f"{setup}: {said}")
    return run


def check_setup(
    task: tuple[Path, tuple[str, str, int, bool], list[list[int]], tuple[str, ...]],
) -> tuple[int, list[str]]:
    """Resume runs of one setup, one for each list of stops; return how many, and what differs."""
    world, setup, all_stops, more = task
    torch.set_num_threads(1)
    whole = end_of(uninterrupted(world, setup))
    wrong = []
    for stops in all_stops:
        run = world / ("cut-" + "-".join(map(str, setup)))
        shutil.rmtree(run, ignore_errors=True)
        wrong += resumed(world, run, setup, stops, *more) or [
            f"{setup}, stopped at {stops}: {what} differs" for what in differences(run, whole)
        ]
    return len(all_stops), wrong


def refusals(world: Path, method: str) -> tuple[int, list[str]]:
    """Resume with each change; return how many there are, and which were accepted or not named."""
    torch.set_num_threads(1)
    run = world / f"identity-{method}"
    train(flags(world, method, run), stop_at(2))
    wrong = []
    for change, said in CHANGES.items():
        code, err = train(flags(world, method, run, change, "--resume=latest"))
        if code != 1 or said not in err:
            wrong.append(f"{method} {change}: exit code {code}, {err.splitlines()[-1] if err else 'nothing said'}")
    return len(CHANGES), wrong


def signals(world: Path, count: int, seed: int = 0) -> tuple[Counter[str], list[str], list[float]]:
    """Send a process signals at random moments; return outcomes, what is wrong, and seconds from signal to exit."""
    chance, wrong, waits = random.Random(seed), [], []
    outcomes: Counter[str] = Counter()
    for number in range(count):
        setup = (METHODS[number % len(METHODS)], "lora", 1, bool(number % 2))
        run, sent = world / f"signal-{number}", SIGNALS[number % len(SIGNALS)]
        argv = flags(world, setup[0], run, ema=setup[3])
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(train(argv)[0])
        # Wait until it trains: before, there is nothing to save, and a signal ends any process.
        while not (run / "metrics.jsonl").exists():
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 1.0))
        os.kill(child, sent)
        began = time.time()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        waits.append(time.time() - began)
        whole = end_of(world / ("whole-" + "-".join(map(str, setup))))
        if code == 0:
            outcomes["had finished"] += 1
        elif code == 128 + sent:
            outcomes["saved"] += 1
            rows = len((run / "metrics.jsonl").read_text().splitlines())
            if end_of(run)[0].step != rows:
                wrong.append(f"{setup}, {sent.name}: {rows} steps taken, {end_of(run)[0].step} saved")
            code = train([*argv, "--resume=latest"])[0]
        elif code == -sent and not (run / "checkpoints").exists() or code == -sent and end_of(run)[0].step == STEPS:
            outcomes["while exporting"] += 1  # all steps are saved by then
            code = train([*argv, "--resume=latest"])[0]
        if code != 0:
            wrong.append(f"{setup}, {sent.name}: exit code {code}")
        else:
            wrong += [f"{setup}, {sent.name}: {what} differs" for what in differences(run, whole)]
    return outcomes, wrong, waits


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few of each")
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    stops = [[stop] for stop in ((3, 6) if args.smoke else range(1, STEPS))]
    setups = [(m, "lora", 1, True) for m in ("dpo", "prdp")] if args.smoke else list(SETUPS)
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(args.processes, get_context("fork")) as pool:
        world = make_world(Path(name))
        for method in ("dpo", "rankdpo"):
            train(flags(world, method, world / f"warm-{method}"))  # so that the cache is there for all
        began = time.perf_counter()

        def report(done: list[tuple[int, list[str]]], said: str) -> None:
            wrong = [text for _, texts in done for text in texts]
            failures.extend(wrong)
            total = sum(count for count, _ in done)
            print(f"{total} {said}, {len(wrong)} wrong; {time.perf_counter() - began:.0f} s", flush=True)
            for text in wrong[:20]:
                print(f"    {text}")

        report(list(pool.map(check_setup, [(world, setup, stops, ()) for setup in setups])), "resumes")
        thrice = [(world, (setup[0], "lora", 1, True), [[1, 2, 5]], ()) for setup in setups[:: 2 if args.smoke else 8]]
        report(list(pool.map(check_setup, thrice)), "runs stopped three times in one epoch")
        workers = [(world, (m, "lora", 1, True), [[6]], ("--dataloader_num_workers=2",)) for m in ("dpo", "rankdpo")]
        report(list(pool.map(check_setup, workers)), "resumes with another number of loader workers")
        methods = ("dpo",) if args.smoke else METHODS
        report(list(pool.map(refusals, [world] * len(methods), methods)), "changes to be refused")
        for setup in {(m, "lora", 1, ema) for m in METHODS for ema in (False, True)}:
            uninterrupted(world, setup)
        outcomes, wrong, waits = signals(world, 3 if args.smoke else args.signals)
        report([(sum(outcomes.values()), wrong)], f"signals at random moments ({dict(outcomes)})")
        print(f"    from signal to exit: median {sorted(waits)[len(waits) // 2]:.2f} s, longest {max(waits):.2f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
