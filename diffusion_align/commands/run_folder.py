"""The run folder: whether a run may write into it, which checkpoint it resumes from, and its records."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from diffusion_align.commands.adapters import KEPT
from diffusion_align.commands.printed_commands import restart_command
from diffusion_align.options.reading.paths import absolute_reward
from diffusion_align.options.reading.place import CHECKPOINTS, CONFIG, LATEST, METRICS, step_named
from diffusion_align.train import record
from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.checkpoints.directory import found as checkpoints_in
from diffusion_align.train.checkpoints.store import Checkpoint

SAMPLES = "samples"
RESULTS = ("pytorch_lora_weights.safetensors", "unet", "step_aware.safetensors")
# All that a run or its evaluation writes, except the cache, which other runs with the same data can use.
RECORDS = (
    CONFIG,
    METRICS,
    CHECKPOINTS,
    SAMPLES,
    KEPT,
    *RESULTS,
    "accuracy.json",
    "evaluation",
    "report.html",
    "report.json",
    "pairs.png",
)


def require_free(run: Path, *, resuming: bool, overwrite: bool) -> None:
    """Check that the folder holds no run, unless that is resumed or overwritten.

    Raises:
        ValueError: naming what was found, and the three remedies.
    """
    holds = [name for name in (METRICS, CHECKPOINTS, *RESULTS) if (run / name).exists()]
    if holds and not resuming and not overwrite:
        raise ValueError(
            f"{run} holds a run already ({holds[0]}): --resume_from_checkpoint latest continues it, "
            "--overwrite_output_dir deletes it and starts again, another --output_dir keeps it"
        )


def find_checkpoint(run: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint to resume from, None for a fresh start.

    `resume` is `latest`, `auto` (the latest, if there is one), the name of one of the run's checkpoints (step-00000300,
    or 300), the path of a checkpoint, or the folder of a run, for its latest checkpoint.

    Raises:
        FileNotFoundError: no such checkpoint (the message lists those that exist), or `latest` and there is none.
        CheckpointError: it is damaged, or all of them are.
    """
    if resume is None:
        return None
    if resume not in LATEST:
        return _named(run, resume)
    found = checkpoint.latest_good(run / CHECKPOINTS)
    if found is None and resume == "latest":
        raise FileNotFoundError(
            f"{run / CHECKPOINTS}: no checkpoint to resume; --resume_from_checkpoint auto starts a new run"
        )
    return found


def _named(run: Path, resume: str) -> Checkpoint:
    """A checkpoint by its name in this run, by its path or that of a file in it, or by the path of its run."""
    path, here, step = Path(resume), run / CHECKPOINTS, step_named(resume)
    if step is not None and (here / f"step-{step:08d}").is_dir():
        return checkpoint.load(here / f"step-{step:08d}")
    if not path.exists():
        there = ", ".join(place.name for place in checkpoints_in(here)[:5]) or "none"
        raise FileNotFoundError(
            f"--resume_from_checkpoint {resume}: no such checkpoint; {here} has {there} (newest first)"
        )
    path = path.parent if path.is_file() else path
    for folder in (path / CHECKPOINTS, path):
        if checkpoints_in(folder):
            latest = checkpoint.latest_good(folder)
            assert latest is not None  # there is one; it raises if all are damaged
            return latest
    return checkpoint.load(path)


def claim(run: Path, config: str, *, step: int, overwrite: bool) -> None:
    """Prepare the folder on the main process: remove the records of an earlier run, or drop those after `step`."""
    for name in RECORDS if overwrite else ():
        path = run / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    record.truncate(run / METRICS, step)
    partial = run / f".{CONFIG}.partial"
    partial.write_text(config, encoding="utf-8")
    os.replace(partial, run / CONFIG)


def resume_line(run: Path, verb: str, reward: str | None = None) -> str:
    """The command that resumes the run, from any folder.

    A Python reward runs only if it is named on the command line, so it is repeated there.
    """
    program = ["--reward", absolute_reward(reward)] if reward and "python:" in reward else []
    config = os.path.abspath(run / CONFIG)
    return restart_command(verb, ["--config", config, "--resume_from_checkpoint", "latest", *program])
