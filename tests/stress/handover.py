"""Kills processes that arrange pictures for other benchmarks' scorers; no picture may be missing, double or broken.

    python tests/stress/handover.py                  # 1,065 grids and 2,400 named pictures, 100 kills each
    python tests/stress/handover.py --prompts 20 --kills 3

The process is killed (SIGKILL) at random moments and started again. After every kill, each file in the scorer's folder
is an intact picture; at the end the files equal those of an undisturbed process, byte for byte, and their names, read
as the scorer reads them, give every prompt as often as it was drawn.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion_align.evaluation.benchmark_folders import arrange, read_drawn
from diffusion_align.evaluation.picture_folder import fill, is_whole

SIDE = 8
PER_PROMPT = {"dpg": 4, "compbench": 1}
SIZES = {"dpg": 1065, "compbench": 2400}
CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex")


def draw_source(folder: Path, layout: str, count: int) -> Path:
    """A folder in GenEval's layout with small pictures, no two alike."""

    def pictures(numbers: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        for number in numbers:
            source = torch.Generator().manual_seed(number)
            yield [number], torch.randint(256, (1, 3, SIDE, SIDE), generator=source).float() / 255

    prompts = [f"a red circle left of {place} blue squares." for place in range(count)]
    extras = [{"item_id": f"vrd{place}", "category": CATEGORIES[place % 8]} for place in range(count)]
    list(fill(folder, prompts, pictures, {"seed": 0}, per_prompt=PER_PROMPT[layout], extras=extras))
    return folder


def arrange_in_child(source: Path, out: Path, layout: str) -> int:
    """Start arranging in a fork; the child never returns."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for _ in arrange(read_drawn(source), out, layout):
            pass
        code = 0
    finally:
        os._exit(code)


def read_as_scorer(home: Path, layout: str) -> Counter[str]:
    """What the benchmark's scorer takes each file for, by the file's name; how often."""
    files = [path for path in home.rglob("*") if path.is_file()]
    if layout == "dpg":
        return Counter(path.name.split(".")[0] for path in files)
    for folder in {path.parent for path in files}:
        numbers = sorted(int(path.name.split("_")[-1].split(".")[0]) for path in folder.iterdir())
        assert numbers == list(range(len(numbers))), f"{folder}: numbered with gaps"
    return Counter(path.name.split("_")[0] for path in files)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed_at(child: int, home: Path, files: int, seconds: float) -> bool:
    """Kill a child some seconds after it has made `files` files; False if it ended before.

    The moment is counted in files because the time to reach one depends on the machine.
    """
    while sum(path.is_file() for path in home.rglob("*")) < files:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def killed(work: Path, layout: str, count: int, kills: int, seed: int) -> tuple[int, int, int, int]:
    """(kills that hit a running child, files inspected after them, broken files, files wrong at the end)."""
    source = draw_source(work / "drawn", layout, count)
    start = time.perf_counter()
    os.waitpid(arrange_in_child(source, work / "whole", layout), 0)
    whole, length, out = contents(work / "whole"), time.perf_counter() - start, work / "cut"
    home, moments = out / layout, random.Random(seed)
    hits = seen = broken = 0
    while hits < kills:
        child = arrange_in_child(source, out, layout)
        hits += killed_at(child, home, moments.randint(0, len(whole)), moments.uniform(0, 2 * length / len(whole)))
        files = [path for path in home.rglob("*") if path.is_file()]
        seen += len(files)
        broken += sum(not is_whole(path) for path in files)
        if moments.random() < 0.2:  # otherwise the folder is soon complete and kills come too late
            shutil.rmtree(out, ignore_errors=True)
    os.waitpid(arrange_in_child(source, out, layout), 0)
    end = contents(out)
    wrong = sum(whole.get(name) != end.get(name) for name in whole.keys() | end.keys())
    read = read_as_scorer(home, layout)
    wrong += sum(times != 1 for times in read.values()) + abs(len(read) - count)
    return hits, seen, broken, wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each layout")
    parser.add_argument("--prompts", type=int, default=None, help="instead of 1,065 and 2,400")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    bad = 0
    for layout, size in SIZES.items():
        with tempfile.TemporaryDirectory() as work:
            count = args.prompts or size
            hits, seen, broken, wrong = killed(Path(work), layout, count, args.kills, args.seed)
        print(f"{layout}: {hits} kills, {seen} files after them, {broken} not whole; at the end {wrong} of {count} bad")
        bad += broken + wrong
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
