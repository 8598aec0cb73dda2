"""What happens after each step of a run: metrics, trackers, the progress bar, the alarm, and whether it is to stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from diffusion_align.commands import run_folder
from diffusion_align.commands.train.tracking import trackers_of
from diffusion_align.options import TrainUnet
from diffusion_align.system.progress import progress_bar
from diffusion_align.train import record
from diffusion_align.train.alarm import CollapseAlarm
from diffusion_align.train.processes.agree import most
from diffusion_align.train.run import StepRecord

if TYPE_CHECKING:
    from diffusion_align.commands.train.session import Session


class Follower:
    """Follows the records of a session from step `at` on; `due`: a checkpoint is to be written."""

    def __init__(self, session: Session, steps: int, shown: Sequence[str], at: int):
        o, main = session.options, session.accelerator.is_main_process
        metrics = session.run / run_folder.METRICS
        self.session, self.steps, self.shown = session, steps, shown
        self.report = trackers_of(o, session.accelerator, session.run, at)
        self.bar = progress_bar(total=steps, initial=at, desc=session.verb, unit="step", hidden=not main)
        self.write = record.recorder(metrics)
        self.alarm = None
        if isinstance(o, TrainUnet) and o.collapse_alarm != "off":
            past = record.read(metrics) if metrics.exists() else []
            self.alarm = CollapseAlarm(o.collapse_winner_error, o.collapse_diversity, o.collapse_patience, past)
        self.collapse: str | None = None
        self.due = False

    def step(self, row: StepRecord) -> None:
        """Average, write and show one step."""
        session = self.session
        if session.ema is not None and row.updated:
            session.ema.update(session.named)
        if session.accelerator.is_main_process:
            self.write({**row.row(), "threads": session.threads.count})
            self.report(row.row())
        figures = {name: f"{row.metrics[name]:.2f}" for name in self.shown if name in row.metrics}
        self.bar.set_postfix({"loss": f"{row.loss:.4f}", **figures}, refresh=False)
        self.bar.update()
        if changed := session.threads.look():
            tqdm.write(f"step {row.step}: {changed}", file=sys.stderr)
        session.best.hear(row.row())
        self.collapse = (self.alarm.hear(row.row()) if self.alarm else None) or self.collapse
        if self.collapse and session.options.collapse_alarm == "warn":
            tqdm.write(f"collapse? step {row.step}: {self.collapse}", file=sys.stderr)
            self.collapse = None

    def decide(self, row: StepRecord) -> tuple[int, str | None]:
        """(the signal that stops the run, or 0; why it collapsed, or None), equal on every rank."""
        # Each rank has read metrics.jsonl for itself, and a network disk may have shown it another file.
        asked, collapsed = self.session.interrupt.asked, int(self.collapse is not None)
        stop, alarmed = most(self.session.accelerator, asked, collapsed)
        regular = row.step % self.session.options.checkpointing_steps == 0
        self.due = self.due or bool(alarmed) or regular or row.step >= self.steps or row.ends
        return stop, (self.collapse or "as another process found") if alarmed else None
