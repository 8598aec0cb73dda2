"""The run folder: who may write into it, where it goes on, and what it says about itself."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from diffusion_align.train import checkpoint, record
from diffusion_align.train.checkpoint import Checkpoint

CONFIG, METRICS, CHECKPOINTS, SAMPLES = "config.yaml", "metrics.jsonl", "checkpoints", "samples"
RESULTS = ("pytorch_lora_weights.safetensors", "unet")
# Everything a run or its evaluation writes, but not the cache, which any run with the same data can use.
RECORDS = (CONFIG, METRICS, CHECKPOINTS, SAMPLES, *RESULTS, "evaluation", "report.html", "report.json", "pairs.png")


def require_free(run: Path, *, resuming: bool, overwrite: bool) -> None:
    """Refuse a folder that holds a run while nobody has said what should become of it.

    Raises:
        ValueError: naming what was found, and the three ways on.
    """
    holds = [name for name in (METRICS, CHECKPOINTS, *RESULTS) if (run / name).exists()]
    if holds and not resuming and not overwrite:
        raise ValueError(
            f"{run} holds a run already ({holds[0]}): --resume_from_checkpoint latest continues it, "
            "--overwrite_output_dir starts again, another --output_dir leaves it alone"
        )


def find_checkpoint(run: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint to go on from: None for a fresh start, `latest`, `auto` (the latest, if there is one) or a path.

    Raises:
        FileNotFoundError: `latest`, but there is none.
        CheckpointError: it is damaged, or all of them are.
    """
    if resume is None:
        return None
    if resume not in ("latest", "auto"):
        return checkpoint.load(resume)
    found = checkpoint.latest_good(run / CHECKPOINTS)
    if found is None and resume == "latest":
        raise FileNotFoundError(
            f"{run / CHECKPOINTS}: no checkpoint to resume; --resume_from_checkpoint auto starts afresh"
        )
    return found


def claim(run: Path, config: str, *, step: int, overwrite: bool) -> None:
    """Make the folder ready: remove an earlier run's records, or cut them back to `step`. On the main process only."""
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
    """What to type to go on; a reward that is a program is run on the user's word only, so it is named again."""
    again = f" --reward {shlex.quote(reward)}" if reward and "python:" in reward else ""
    return f"diffusion-align {verb} --config {run / CONFIG} --resume_from_checkpoint latest{again}"
