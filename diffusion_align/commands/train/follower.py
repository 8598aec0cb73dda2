"""Runs a training loop: after each step metrics, trackers, progress bar, alarm, checkpoints, and whether to stop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm

from diffusion_align.commands import run_folder
from diffusion_align.commands.train.session import Session
from diffusion_align.commands.train.tracking import finish_trackers, trackers_of
from diffusion_align.options import TrainUnet
from diffusion_align.system.progress import progress_bar
from diffusion_align.train import record
from diffusion_align.train.alarm import CollapseAlarm, CollapseError
from diffusion_align.train.processes import watch
from diffusion_align.train.processes.agree import max_over_ranks
from diffusion_align.train.rounds import NothingToLearn
from diffusion_align.train.run import Run, StepRecord
from diffusion_align.train.update import NonFiniteError


class Follower:
    """Processes the records of a session from step `at` on. due: a checkpoint must be written."""

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
        """Update the EMA, write the metrics, show progress, and check the alarm for one step."""
        session = self.session
        if session.ema is not None and row.updated:
            session.ema.update(session.named)
        if session.accelerator.is_main_process:
            self.write({**row.row(), "threads": session.threads.count})
            self.report(row.row())
        figures = {name: f"{row.metrics[name]:.2f}" for name in self.shown if name in row.metrics}
        self.bar.set_postfix({"loss": f"{row.loss:.4f}", **figures}, refresh=False)
        self.bar.update()
        if changed := session.threads.adjust():
            tqdm.write(f"step {row.step}: {changed}", file=sys.stderr)
        session.best.observe(row.row())
        self.collapse = (self.alarm.check(row.row()) if self.alarm else None) or self.collapse
        if self.collapse and session.options.collapse_alarm == "warn":
            tqdm.write(f"collapse? step {row.step}: {self.collapse}", file=sys.stderr)
            self.collapse = None

    def decide(self, row: StepRecord) -> tuple[int, str | None]:
        """(the signal that stops the run, or 0; why it collapsed, or None), equal on all ranks."""
        # Ranks may disagree on the alarm: each reads metrics.jsonl itself, and a network disk may show an old version.
        number, collapsed = self.session.interrupt.signal_number, int(self.collapse is not None)
        stop, alarmed = max_over_ranks(self.session.accelerator, number, collapsed)
        regular = row.step % self.session.options.checkpointing_steps == 0
        self.due = self.due or bool(alarmed) or regular or row.step >= self.steps or row.ends
        return stop, (self.collapse or "as another process found") if alarmed else None


def follow(
    session: Session, records: Iterable[StepRecord], run: Run, shown: Sequence[str],
    report: Callable[[int], None] | None = None,
) -> int:  # fmt: skip
    """Run a loop to its end: metrics, checkpoints, grids, and finally the trained weights.

    A checkpoint inside a round contains the data of the round, so it is written there only if the run must stop;
    regular checkpoints wait for the end of the round.

    Args:
        shown: metrics on the progress bar.
        report: called on the main process after the weights are written, with the number of steps.

    Raises:
        Interrupted: after a signal and a checkpoint; the message has the command that resumes the run.
        CollapseError: the alarm stopped the run, after a checkpoint.
        NonFiniteError, NothingToLearn: from the loop, after a checkpoint of the last good weights.
    """
    progress, steps = run.progress, run.max_steps
    if progress.step:
        session.accelerator.print(f"resumed at step {progress.step} of {steps}")
    follower = Follower(session, steps, shown, progress.step)
    last, saved = StepRecord(progress.step, 0, 0.0, {}, progress, round=run.round), progress.step
    # Within the interrupt: when one process fails, the launcher sends SIGTERM to others that still print their error.
    with follower.bar, session.interrupt, watch.names_failed_rank(NonFiniteError, NothingToLearn, CollapseError):
        try:
            for last in records:
                follower.step(last)
                stop, collapse = follower.decide(last)
                if stop or (follower.due and last.round is None):
                    kept = session.save(last)
                    follower.due, saved = False, last.step if kept else saved
                    if stop:
                        session.stopped(last.step, stop, kept)
                    if collapse is not None:
                        also = ", and saved," if kept else ""
                        raise CollapseError(f"stopped{also} at step {last.step}: {collapse}")
                if session.grid_due(last.step) and last.step < steps:
                    session.draw(last.step)
        except (NonFiniteError, NothingToLearn):
            if saved < last.step:
                session.save(last)
            raise
        (stop,) = max_over_ranks(session.accelerator, session.interrupt.signal_number)
        if stop and last.step < steps and not last.ends:  # an online loop stopped while it drew a round
            session.stopped(last.step, stop, session.save(last))
    finish_trackers(session.accelerator)
    return session.export(last.step, report)
