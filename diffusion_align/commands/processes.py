"""The processes of a training job: how long they wait for one another, and that the one at fault is named."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from diffusion_align.options.train_common import TrainCommon
from diffusion_align.options.train_spm import TrainSpm
from diffusion_align.train import watch
from diffusion_align.train.agree import meet

RANKS = ".ranks"  # in the run folder


def join(o: TrainCommon | TrainSpm, project_dir: str | None = None) -> Accelerator:
    """The accelerator of this process, once all processes of the job are there. It starts the notes of `watch`."""
    # NCCL would else abort the process at the time-out, instead of raising where the rank at fault can be named.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    # accelerate takes no notice of a limit that is its own default for another backend: hence a microsecond more.
    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=o.process_timeout, microseconds=1))
    cpu = o.device == "cpu"
    accelerator = Accelerator(
        mixed_precision=o.mixed_precision, cpu=cpu, project_dir=project_dir, kwargs_handlers=[limit]
    )
    watch.start(Path(o.output_dir) / RANKS, accelerator.process_index, accelerator.num_processes)
    meet(accelerator)
    return accelerator
