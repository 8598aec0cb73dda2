"""Finds the folder of a run: the one that the user names, even if its configuration records another."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..names import UsageError

CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoints"
LATEST = ("latest", "auto")
_STEP = re.compile(r"(?:(?:step|checkpoint)-)?0*(\d+)")


def step_named(text: str) -> int | None:
    """The step in the name of a checkpoint: step-00000300, step-300, checkpoint-300 (diffusers' name) or 300."""
    found = _STEP.fullmatch(text)
    return int(found[1]) if found else None


def run_of(path: Path) -> Path | None:
    """The run folder that a path is or is in (config.yaml, checkpoints, a checkpoint); else None."""
    path = Path(os.path.abspath(path))  # of `.` too
    for place in (path, *list(path.parents)[:3]):
        if (place / METRICS).is_file() or any((place / CHECKPOINTS).glob("step-*")):
            return place
    return None


def output_of(values: Mapping[str, Any], origins: Mapping[str, str], config: Path | None) -> tuple[str, str] | None:
    """The run folder that contains the configuration or the checkpoint, and which option named it; else None.

    `output_dir` in config.yaml only records where a run was started: a run that was moved, renamed or copied continues
    in its new folder. `--output_dir` on the command line may place a new run, or one that starts from a checkpoint of
    another run; it may not contradict the run that is resumed.

    Raises:
        UsageError: two folders are named for one run.
    """
    named = run_of(config) if config is not None and config.name == CONFIG else None
    named = named if config is not None and named == Path(os.path.abspath(config.parent)) else None
    resume = values.get("resume_from_checkpoint")
    path = Path(resume) if resume is not None and resume not in LATEST else None
    resumed = run_of(path) if path is not None and path.exists() else None
    if origins.get("output_dir") == "command line":
        given = Path(values["output_dir"])
        if named is not None and resume is not None and resumed is None and not _same(given, named):
            raise UsageError(
                f"--config names the run in {named} and --output_dir another folder, {given}: leave --output_dir out "
                "to continue the run where it is, or leave --resume_from_checkpoint out to start a new one"
            )
        return None
    if named is not None and resumed is not None and not _same(named, resumed):
        raise UsageError(
            f"--config names the run in {named}, --resume_from_checkpoint one in {resumed}: give --output_dir as well, "
            "to say which folder is written"
        )
    if named is not None:
        return str(named), "--config"
    if resumed is not None and "output_dir" not in origins:
        return str(resumed), "--resume_from_checkpoint"
    return None


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
