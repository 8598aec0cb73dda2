"""The processes of a training job: how long they wait for one another, and that the one at fault is named."""

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
    """The accelerator of this process, once all processes of the job are there. It starts the notes of `watch`."""
    # NCCL would else abort the process at the time-out, instead of raising where the rank at fault can be named.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    # accelerate takes no notice of a limit that is its own default for another backend: hence a microsecond more.
    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=o.process_timeout, microseconds=1))
    with _device_of_accelerate(o.device):
        accelerator = Accelerator(
            mixed_precision=o.mixed_precision, cpu=o.device == "cpu", project_dir=project_dir, kwargs_handlers=[limit]
        )
    if o.device is not None and accelerator.device.type != o.device.partition(":")[0]:
        raise ValueError(f"--device {o.device} was asked for and accelerate took {accelerator.device}: leave it out")
    watch.start(Path(o.output_dir) / RANKS, accelerator.process_index, accelerator.num_processes)
    barrier(accelerator)
    return accelerator


@contextmanager
def _device_of_accelerate(word: str | None) -> Iterator[None]:
    """accelerate takes the best device, whatever was asked for: a device by name reaches it through the environment
    only. With several processes it knows which device each has."""
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
