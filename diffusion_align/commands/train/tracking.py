"""Trackers, through accelerate: tensorboard, wandb and others.

`metrics.jsonl` is the record of a run; a tracker only shows it. So an error of a tracker, such as a lost connection,
never ends the run: the tracker is left out with a warning.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.options import TrainCommon, UsageError, unknown
from diffusion_align.options.schema import options_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Row = dict[str, Any]
logger = logging.getLogger(__name__)


def tracker_names(report_to: str | None) -> list[str]:
    """The trackers that `--report_to` names: one, several with commas between, `all` that are installed, or `none`.

    Raises:
        UsageError: accelerate does not know it (with the nearest name), or its package is not installed.
    """
    wanted = [word.strip() for word in (report_to or "none").split(",") if word.strip()]
    if not wanted or wanted == ["none"]:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    here = [str(name) for name in get_available_trackers()]
    if wanted == ["all"]:
        return here
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    for name in wanted:
        if name not in known:
            raise unknown("tracker", name, known, otherwise=f"there are {', '.join(known)}, all and none")
        if name not in here:
            cure = "pip install 'diffusion_align[track]'" if name == "tensorboard" else f"pip install {name}"
            raise UsageError(f"output.report_to {name}: its package is not installed; {cure}, or leave the option out")
    return wanted


class Guarded:
    """A tracker that is left out, with one warning, after its first error. It cannot help if the tracker hangs."""

    def __init__(self, tracker: Any) -> None:
        self.name, self._tracker, self._lost = tracker.name, tracker, False

    def log(self, values: Row, step: int) -> None:
        self._try("failed and is left out", lambda: self._tracker.log(values, step=step))

    def finish(self) -> None:
        """Called at the end of the training."""
        self._try("could not finish", lambda: self._tracker.finish())

    def _try(self, trouble: str, act: Callable[[], object]) -> None:
        if self._lost:
            return
        try:
            act()
        except Exception as error:  # each tracker has its own errors
            self._lost = True
            _warn(self.name, trouble, error)


def trackers_of(o: TrainCommon, accelerator: Accelerator, run: Path, step: int) -> Callable[[Row], None]:
    """Start the trackers of the options; returns a function that reports a row of metrics after `step`."""
    described = options_of(type(o))  # without options that are not saved, such as tokens: trackers write to disk
    config = {name: value for name, value in dataclasses.asdict(o).items() if described[name].saved}
    project = o.tracker_name or "diffusion_align"
    return start_trackers(accelerator, tracker_names(o.report_to), project, run, config, step)


def finish_trackers(accelerator: Accelerator) -> None:
    """End the trackers. accelerate's own method would also end the process group, before the weights are written."""
    for tracker in accelerator.trackers:
        tracker.finish()


def start_trackers(
    accelerator: Accelerator, names: list[str], project: str, run: Path, config: Row, step: int = 0
) -> Callable[[Row], None]:
    """Start the trackers on all ranks and return a function that reports a row of metrics to them.

    TensorBoard deletes what a killed run wrote of steps after `step`, which are repeated.
    """
    if not names:
        return lambda row: None
    # Trackers take flat values only.
    flat = {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in config.items()}
    started: list[Guarded] = []
    for name in names:
        accelerator.trackers = []  # or accelerate would start the earlier ones again
        try:
            accelerator.log_with = [name]  # pyright: ignore[reportAttributeAccessIssue]
            given = {"wandb": {"name": run.name}, "tensorboard": {"purge_step": step + 1}}
            accelerator.init_trackers(project, config=flat, init_kwargs=given)
            started += map(Guarded, accelerator.trackers)
        except Exception as error:
            _warn(name, "could not start and is left out", error)
    accelerator.trackers = started

    def report(row: Row) -> None:
        values = {key: value for key, value in row.items() if key != "step"}
        for tracker in started:
            tracker.log(values, step=row["step"])

    return report


def _warn(name: str, trouble: str, error: Exception) -> None:
    logger.warning("tracker %s %s: %s", name, trouble, " ".join(str(error).split()) or type(error).__name__)
