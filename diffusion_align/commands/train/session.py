"""The state of a training run outside the loop of its method: folder, devices, model, checkpoints, sample grids.

`train.train` opens a session, and `follower.follow` runs the loop of the method in it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import Parameter

from diffusion_align.commands import run_folder
from diffusion_align.commands.adapters import keep_lora
from diffusion_align.commands.interrupt import Interrupted, Interruptible
from diffusion_align.commands.printed_commands import command_line
from diffusion_align.commands.threads import Threads
from diffusion_align.commands.train import grids
from diffusion_align.commands.train.best import Best
from diffusion_align.commands.train.course import extend_rate
from diffusion_align.commands.train.identity import Facts, facts_of, require_same_run
from diffusion_align.commands.versions import versions, warn_of_versions
from diffusion_align.methods.entry import Trained
from diffusion_align.options import to_yaml
from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.checkpoints.round_data import round_name, round_of, write_round
from diffusion_align.train.checkpoints.state import pack, restore
from diffusion_align.train.checkpoints.store import Checkpoint, CheckpointError
from diffusion_align.train.ema import Ema
from diffusion_align.train.processes import watch
from diffusion_align.train.processes.agree import barrier, on_any_rank, require_equal_ranks
from diffusion_align.train.run import Run, StepRecord, first_progress

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage
    from diffusion_align.models.guidance import Predict

KEEP_ALL = sys.maxsize
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Session:
    """All of a run except its data and its loss. chunks: classes of what a round consists of, in a checkpoint."""

    options: Any
    verb: str
    run: Path
    resumed: Checkpoint | None
    accelerator: Accelerator
    model: TextToImage
    threads: Threads
    chunks: tuple[type, ...]
    trained: Trained = field(init=False)
    reference: Predict | None = field(init=False, default=None)
    ema: Ema | None = field(init=False, default=None)
    optimizer: torch.optim.Optimizer = field(init=False)
    scheduler: torch.optim.lr_scheduler.LambdaLR = field(init=False)
    identity: dict[str, Any] = field(init=False)
    facts: Facts = field(init=False)
    prompts: list[str] = field(init=False)
    base: Tensor = field(init=False)
    interrupt: Interruptible = field(init=False, default_factory=Interruptible)
    best: Best = field(init=False)

    def stop_requested(self) -> bool:
        """Whether this process got a signal to stop."""
        return self.interrupt.signal_number > 0

    def trains(self, trained: Trained | None) -> None:
        """Set what a method trains instead of the UNet; None: the UNet."""
        if trained is not None:
            self.trained = trained

    @property
    def named(self) -> dict[str, Parameter]:
        return self.trained.named

    @property
    def parameters(self) -> list[Parameter]:
        return list(self.named.values())

    @property
    def _draws(self) -> bool:
        """Whether the run has sample grids."""
        return self.trained.pictures and self.options.run_validation is not False

    @watch.names_failed_rank()
    def start(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        identity: dict[str, Any],
        prompts: Sequence[str],
        steps: int,
    ) -> Run:
        """Prepare the run folder, draw the base's pictures, and load the checkpoint; returns the run for the engine."""
        o, resumed, extended = self.options, self.resumed, None
        self.facts = facts_of(o, number=len(prompts))
        self.optimizer, self.scheduler, self.identity = optimizer, scheduler, identity
        at = resumed.step if resumed else 0
        require_equal_ranks(
            self.accelerator, at, "as the step to resume from: give all the same output_dir, on a disk they share"
        )
        if resumed is not None:
            extended = require_same_run(o, resumed, identity, self.facts, self.accelerator.num_processes)
        self.base = torch.empty(0)
        if self.accelerator.is_main_process:
            run_folder.claim(self.run, to_yaml(o, self.verb, absolute=True), step=at, overwrite=o.overwrite_output_dir)
            keep_lora(o, self.run)
        if self._draws:
            self.prompts = grids.grid_prompts(o.validation_prompts, prompts)
            if self.accelerator.is_main_process:
                with self.accelerator.autocast():  # before the checkpoint is loaded, while the policy is the base
                    folder = self.run / run_folder.SAMPLES / "base"
                    self.base = grids.base_pictures(self.model, self.prompts, folder, **self._look)
        progress, round = first_progress(o.mixed_precision), None
        self.best = Best(o.keep_best, resumed.state.get("best") if resumed else None)
        if resumed is not None:
            warn_of_versions(resumed.state.get("versions", {}))
            progress = restore(resumed, self.named, optimizer, scheduler, self.ema)
            if extended is not None:
                self.accelerator.print(extend_rate(o, scheduler, extended, identity["steps"], at))
            if progress.in_round:
                round = round_of(resumed, self.accelerator.process_index, self.accelerator.num_processes, self.chunks)
        barrier(self.accelerator)
        return Run(
            self.parameters, optimizer, scheduler, self.accelerator, o.seed, steps, progress,
            max_grad_norm=o.max_grad_norm, spike=o.skip_spikes, round=round, stop_requested=self.stop_requested,
        )  # fmt: skip

    @property
    def _look(self) -> dict[str, Any]:
        o = self.options
        sampler = {"steps": o.validation_sampling_steps, "guidance": o.validation_guidance}
        return {"seed": o.seed, "resolution": o.resolution, **sampler}

    def grid_due(self, step: int) -> bool:
        """Whether a sample grid is to be drawn after this step."""
        return bool(self._draws and self.options.run_validation and step % self.options.validation_steps == 0)

    def stopped(self, step: int, number: int, kept: bool) -> NoReturn:
        """End the run after signal `number`; `kept`: whether the step is saved."""
        watch.stop()
        what = f"step {step} is saved" if kept else f"step {step} could not be saved, but earlier checkpoints exist"
        command = run_folder.resume_line(self.run, self.verb, getattr(self.options, "reward", None))
        raise Interrupted(f"{what}; continue with: {command}", number)

    def save(self, row: StepRecord) -> bool:
        """Write a checkpoint of a step. If that fails, on a full disk, the run continues; then False on all ranks."""
        watch.record_activity("saving", row.step)
        accelerator, folder = self.accelerator, self.run / run_folder.CHECKPOINTS
        error = write_round(folder, accelerator.process_index, row.round) if row.round is not None else None
        (failed,) = on_any_rank(accelerator, error is not None)
        if accelerator.is_main_process and not failed:
            tensors, state = pack(self.named, self.optimizer, self.scheduler, row.progress, self.ema)
            state |= {"identity": self.identity, "facts": self.facts, "processes": accelerator.num_processes}
            state |= {"versions": versions(), "threads": self.threads.count}
            state["best"] = best = self.best.updated(row.step)
            protect = ({best["step"]} if best else set()) | ({self.resumed.step} if self.resumed else set())
            parts = range(accelerator.num_processes if row.round is not None else 0)
            try:
                checkpoint.save(
                    folder, row.step, tensors, state, keep=self.options.checkpoints_total_limit or KEEP_ALL,
                    protect=protect, parts=[checkpoint.part_path(folder, round_name(rank)) for rank in parts],
                )  # fmt: skip
                self.best.accept(best)
            except CheckpointError as problem:
                error = problem
        if error is not None:
            logger.warning("%s; the training continues", error)
        return not on_any_rank(accelerator, error is not None)[0]

    def draw(self, step: int) -> None:
        """Draw the sample grid of this step beside the base's pictures, unless the run has no grids."""
        if not self._draws:
            return
        watch.record_activity("drawing the sample grid", step)
        if self.accelerator.is_main_process:
            with self.accelerator.autocast():
                path = self.run / run_folder.SAMPLES / f"step-{step:08d}.png"
                grids.write_grid(self.model, self.prompts, self.base, path, **self._look)
        barrier(self.accelerator)

    @watch.names_failed_rank()
    def export(self, steps: int, report: Callable[[int], None] | None) -> int:
        """Write the trained weights (the EMA if there is one) and then draw the last grid, which may take long."""
        with self.ema.applied(self.named) if self.ema is not None else nullcontext():
            if self.accelerator.is_main_process:
                try:
                    written = self.trained.write(self.run)
                except (OSError, SafetensorError) as error:  # most likely a full disk
                    command = run_folder.resume_line(self.run, self.verb, getattr(self.options, "reward", None))
                    raise OSError(
                        f"the trained weights could not be written to {self.run}: {error}. The checkpoint of step "
                        f"{steps} has them; make room, then {command} writes them"
                    ) from error
                print(f"trained weights: {written}", flush=True)
                if report is not None:
                    report(steps)
            self.draw(steps)
        if self.trained.pictures:
            self.accelerator.print(f"next: {command_line('evaluate', self.run)}")
        barrier(self.accelerator)
        watch.stop()
        return 0
