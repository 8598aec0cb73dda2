"""SIGKILLs at random moments of a process that saves checkpoints continuously, ours or accelerate's.

A checkpoint is a model and its two AdamW moments. Its numbers follow from its step, so a reader knows its content.
"""

import os
import random
import re
import select
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.train.checkpoints.store import Checkpoint, CheckpointError, latest_good, load, save

GROUPS = ("model", "first", "second")
Content = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]


def base(parameters: int) -> Tensor:
    return rng.normal((parameters,), 0, "checkpoint kills")


def content(step: int, weights: Tensor) -> Content:
    tensors = {group: {"weights": weights + step, "step": torch.tensor(step)} for group in GROUPS}
    return tensors, {"step": step, "text": "é", "rate": 0.1}


def is_content(loaded: Checkpoint, weights: Tensor) -> bool:
    tensors, state = content(loaded.step, weights)
    return loaded.state == state and all(
        torch.equal(loaded.tensors[group][name], value) for group in GROUPS for name, value in tensors[group].items()
    )


def in_child(work: Callable[[], int | None]) -> int:
    """Run `work` in a fork and return the child's id; its exit code is what `work` returns, or 70 if it raises."""
    child = os.fork()
    if child == 0:
        code = 70
        torch.set_num_threads(1)  # a fork does not inherit the parent's threads, and would wait for them for ever
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(folder: Path, count: int, parameters: int, seed: int = 0) -> Counter[str]:
    """Kill a saving process `count` times at random moments of two saves, and inspect the folder each time. Counts:

    inside: kills in the middle of a save. unloadable: no checkpoint, or not what was saved. lost: the newest is older
    than the last one reported as saved. offered: broken files or folders named like a checkpoint. left: what is there
    beside the checkpoints after another save.
    """
    weights, chance = base(parameters), random.Random(seed)
    found: Counter[str] = Counter(kills=0, inside=0, unloadable=0, lost=0, offered=0, left=0)

    def keep_saving(first: int, report: Callable[[int], None]) -> None:
        for step in range(first, first + 1000):
            save(folder, step, *content(step, weights), keep=2)
            report(step)

    reached = 0
    for _ in range(count):
        last = killed(lambda report: keep_saving(reached + 1, report), chance)  # noqa: B023
        names = os.listdir(folder)
        found["inside"] += any(name.startswith(".") for name in names)
        found["offered"] += sum(not is_intact(folder / name) for name in names if re.fullmatch(r"step-\d+", name))
        reached = newest(folder, weights)
        found["unloadable"] += reached == 0
        found["lost"] += reached < last
        found["kills"] += 1
        reached = max(reached, last)
    save(folder, reached + 1, *content(reached + 1, weights), keep=2)
    kept = {f"step-{step:08d}" for step in (reached, reached + 1)}
    found["left"] = len(set(os.listdir(folder)) - kept)
    return found


def newest(folder: Path, weights: Tensor) -> int:
    """The step of the checkpoint that a run would resume from; 0 if none loads or its content is wrong."""
    try:
        latest = latest_good(folder)
    except CheckpointError:
        return 0
    return latest.step if latest is not None and is_content(latest, weights) else 0


def is_intact(path: Path) -> bool:
    try:
        load(path)
    except CheckpointError:
        return False
    return True


def accelerate_kills(folder: Path, count: int, parameters: int, seed: int = 0) -> Counter[str]:
    """The same with accelerate's save_state, as diffusers' scripts use it: remove the oldest first, load the newest."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(parameters // 1000, 1000, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, parameters // 1000)).sum().backward()
    optimizer.step()
    chance = random.Random(seed)

    def checkpoints() -> list[Path]:
        return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))

    def keep_saving(first: int, report: Callable[[int], None]) -> None:
        for step in range(first, first + 1000):
            for old in checkpoints()[:-1]:
                shutil.rmtree(old)
            accelerator.save_state(str(folder / f"checkpoint-{step}"))
            report(step)

    def resume() -> None:
        accelerator.load_state(str(checkpoints()[-1]))

    found: Counter[str] = Counter(kills=0, unloadable=0)
    accelerator.save_state(str(folder / "checkpoint-0"))
    if ended(in_child(resume)):
        raise RuntimeError("accelerate cannot load an undisturbed checkpoint, so its counts would mean nothing")
    for number in range(count):
        killed(lambda report: keep_saving(1000 * number + 1, report), chance)  # noqa: B023
        found["kills"] += 1
        found["unloadable"] += ended(in_child(resume)) != 0
        for path in checkpoints():
            shutil.rmtree(path)
    return found


def killed(work: Callable[[Callable[[int], None]], None], chance: random.Random) -> int:
    """Run `work` in a child that reports the steps it saves; kill it at a random moment after the first one. Returns
    the last step that it reported."""
    ours, theirs = os.pipe()

    def report(step: int) -> None:
        os.write(theirs, step.to_bytes(8, "big"))  # fails if the parent is gone, which ends the child

    def saving() -> None:
        os.close(ours)
        work(report)

    begun = time.monotonic()
    child = in_child(saving)
    os.close(theirs)
    try:
        if not select.select([ours], [], [], 120)[0]:
            raise RuntimeError("no save came through in two minutes")
        time.sleep(chance.uniform(0, 2 * (time.monotonic() - begun)))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    steps = b"".join(iter(lambda: os.read(ours, 4096), b""))
    os.close(ours)
    return int.from_bytes(steps[-8:], "big")
