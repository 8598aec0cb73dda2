"""Short training runs of every method on a random model in Stable Diffusion's format.

A run is the real command in this process, with its folder, signals, checkpoints and export. Two runs are equal if all
of their last checkpoints and every byte of metrics.jsonl are.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from helpers_tiny import make_tiny_folder

from diffusion_align import cli
from diffusion_align.data import write_pairs_parquet
from diffusion_align.data.images import encode_png
from diffusion_align.shapes import sample_captions
from diffusion_align.train import record
from diffusion_align.train.checkpoints import store as checkpoint

METHODS = ("dpo", "rankdpo", "d3po", "spo", "prdp")
STEPS = 12


def make_world(folder: Path, pairs: int = 10) -> Path:
    """A random model of 64-pixel pictures; pairs, rankings and prompts. An epoch of 10 ends inside of steps of 4."""
    model = make_tiny_folder(folder / "model")
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    source = torch.Generator().manual_seed(0)
    captions = sample_captions(pairs, 0, unique=True)
    pictures = [[encode_png(torch.rand(3, 64, 64, generator=source)) for _ in captions] for _ in range(3)]
    write_pairs_parquet(folder / "pairs.parquet", captions, pictures[0], pictures[1], [1.0, 0.0] * (pairs // 2))
    rows = []
    for i, caption in enumerate(captions):
        files = [f"{i}-{k}.png" for k in range(3 if i % 3 else 2)]
        for file, picture in zip(files, pictures, strict=False):
            (folder / file).write_bytes(picture[i])
        rows.append(
            json.dumps(
                {"prompt": caption, "images": files, "relevance": [k / (len(files) - 1) for k in range(len(files))]}
            )
        )
    (folder / "rankings.jsonl").write_text("\n".join(rows))
    (folder / "prompts.txt").write_text("\n".join(captions[:6]))
    return folder


def flags(
    world: Path, method: str, run: Path, *more: str, mode: str = "lora", pieces: int = 1, ema: bool = False
) -> list[str]:
    """The command line of a run of 12 steps, each of `pieces` micro-batches or, online, chunks.

    Online methods take 4 steps a round: two passes over its four prompts, two at a time.
    """
    words = f"""train {method} --model {world / "model"} --output_dir {run} --device cpu --mode {mode}
        --max_train_steps {STEPS} --checkpointing_steps 1000 --learning_rate 1e-3 --lr_scheduler cosine
        --lr_warmup_steps 2 --validation_sampling_steps 1 --validation_prompt circle --collapse_alarm off""".split()
    if ema:
        words += ["--use_ema", "--ema_decay=0.9"]
    if method in ("dpo", "rankdpo"):
        words += ["--train_data_dir", str(world / ("pairs.parquet" if method == "dpo" else "rankings.jsonl"))]
        words += ["--cache_dir", str(world / f"cache-{method}"), "--proportion_empty_prompts=0.3"]
        words += [f"--train_batch_size={4 // pieces}", f"--gradient_accumulation_steps={pieces}"]
        return [*words, *more]
    words += f"""--prompts {world / "prompts.txt"} --reward random --solver dpmpp --order 2 --steps 3 --guidance 2
        --prompts_per_round 4 --passes 2 --prompts_per_step 2""".split()
    words += ["--sample_chunk", str(4 // min(pieces, 2))]
    words += ["--start=1", "--threshold=0", "--children=2"] if method == "spo" else ["--group_size=2"]
    return [*words, *more]


def train(argv: list[str], after: Callable[[dict[str, Any]], None] | None = None) -> tuple[int, str]:
    """Run a command, calling `after` with each row once it is written; return the exit code and stderr."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    said, real = io.StringIO(), record.append

    def append(path: Any, row: dict[str, Any]) -> None:
        real(path, row)
        if after is not None:
            after(row)

    record.append = append
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = cli.main(argv)
    finally:
        record.append = real
    return code, said.getvalue()


def stop_at(step: int, number: int = signal.SIGTERM) -> Callable[[dict[str, Any]], None]:
    """Send this process a signal once the row of a step is written."""

    def after(row: dict[str, Any]) -> None:
        if row["step"] == step:
            os.kill(os.getpid(), number)

    return after


def end_of(run: Path) -> tuple[checkpoint.Checkpoint, bytes]:
    """A run's last checkpoint, and the bytes of its metrics."""
    found = checkpoint.latest_good(run / "checkpoints")
    assert found is not None, f"{run} has no checkpoint"
    return found, (run / "metrics.jsonl").read_bytes()


def differences(run: Path, uninterrupted: tuple[checkpoint.Checkpoint, bytes]) -> Iterator[str]:
    """What at a run's end differs, in any bit, from the uninterrupted run."""
    (found, rows), (wanted, all_rows) = end_of(run), uninterrupted
    if found.step != wanted.step:
        yield f"step {found.step}, not {wanted.step}"
    if rows != all_rows:
        yield "metrics.jsonl"
    for key in found.state.keys() | wanted.state.keys():
        if found.state.get(key) != wanted.state.get(key):
            yield f"state.json: {key}"
    for group in found.tensors.keys() | wanted.tensors.keys():
        here, there = found.tensors.get(group, {}), wanted.tensors.get(group, {})
        for name in here.keys() | there.keys():
            a, b = here.get(name), there.get(name)
            if a is None or b is None or a.dtype != b.dtype or not torch.equal(a, b):
                yield f"{group}: {name}"
