"""The processes of a training job: their accelerator, time-out and notes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from diffusion_align.options import TrainCommon
from diffusion_align.train.processes import watch
from diffusion_align.train.processes.agree import barrier

ACCELERATE_DEVICE = "ACCELERATE_TORCH_DEVICE"
RANKS = ".ranks"  # in the run folder


def join(o: TrainCommon, project_dir: str | None = None) -> Accelerator:
    """The accelerator of this process, after all processes of the job have joined. It starts the notes of `watch`."""
    # At the time-out NCCL must raise, so that the rank at fault can be named; by default it aborts the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    # accelerate ignores a time-out that equals its default for another backend, hence one microsecond more.
    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=o.process_timeout, microseconds=1))
    with _device_of_accelerate(o.device):
        accelerator = Accelerator(
            mixed_precision=o.mixed_precision, cpu=o.device == "cpu", project_dir=project_dir, kwargs_handlers=[limit]
        )
    if o.device is not None and accelerator.device.type != o.device.partition(":")[0]:
        raise ValueError(f"accelerate uses {accelerator.device} instead of --device {o.device}: leave the option out")
    watch.start(Path(o.output_dir) / RANKS, accelerator.process_index, accelerator.num_processes)
    barrier(accelerator)
    return accelerator


@contextmanager
def _device_of_accelerate(word: str | None) -> Iterator[None]:
    """Pass a device to accelerate through the environment, as it has no argument for it and would use the best device.
    With several processes accelerate assigns the devices."""
    if word is None or word == "cpu" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    before = os.environ.get(ACCELERATE_DEVICE)
    os.environ[ACCELERATE_DEVICE] = word
    try:
        yield
    finally:
        os.environ.pop(ACCELERATE_DEVICE)
        if before is not None:
            os.environ[ACCELERATE_DEVICE] = before
