"""The training commands that the check runs: each method on the embedded model, and at the size of real models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

METHODS = ("dpo", "rankdpo", "d3po", "spo", "prdp", "ddpo")


@dataclass(frozen=True)
class Scale:
    """The size of a run: pictures a prompt (in rankings and online; SPO's branches), prompts a round, rollout steps."""

    pictures: int = 4
    prompts: int = 2
    steps: int = 5


QUIET = "--run_validation=false --validation_sampling_steps 1 --collapse_alarm off --checkpointing_steps 100000".split()


def embedded(
    method: str, run: Path, device: str, precision: str, scale: Scale, steps: int = 2, batch: int = 4
) -> list[str]:
    """A short run of the embedded model by the method's preset."""
    argv = f"train {method} --preset tiny --max_train_steps {steps} --device {device} --mixed_precision {precision}"
    words = [*argv.split(), "--output_dir", str(run), *QUIET, "--lr_warmup_steps", "0"]
    if method in ("dpo", "rankdpo"):
        words += ["--cache_dir", str(run.parent / "cache")]
        return [*words, f"--train_batch_size={batch}", "--max_train_samples=16"]
    pictures = f"--{'children' if method == 'spo' else 'group_size'}={scale.pictures}"
    rounds = [f"--prompts_per_round={2 * scale.prompts}", "--num_prompts=8"]
    return [*words, *rounds, pictures, f"--sample_chunk={batch * scale.pictures}"]


def at_size(
    method: str, model: Path, data: Path, run: Path, device: str, precision: str, resolution: int, batch: int,
    scale: Scale,
) -> list[str]:  # fmt: skip
    """Four steps of a method on a model folder: LoRA of rank 8, checkpointed gradients, guidance 5 online.

    `batch` is what goes through the network together: pairs (dpo), pictures (all others).
    """
    argv = f"""train {method.removesuffix("-full")} --device {device} --mixed_precision {precision}
        --resolution {resolution} --max_train_steps 4 --rank 8 --gradient_checkpointing
        --mode {"full" if method.endswith("-full") else "lora"}"""
    words = [*argv.split(), "--model", str(model), "--output_dir", str(run), *QUIET]
    name = method.removesuffix("-full")
    if name in ("dpo", "rankdpo"):
        file, size = ("pairs.parquet", batch) if name == "dpo" else ("rankings.jsonl", max(1, batch // scale.pictures))
        words += ["--train_data_dir", str(data / file), f"--train_batch_size={size}"]
        return [*words, "--cache_dir", str(run.parent / f"cache-{model.name}")]
    pictures = min(scale.pictures, batch)
    words += f"""--reward jpeg-small --solver ddim --steps {scale.steps} --guidance 5
        --prompts_per_round {scale.prompts} --sample_chunk {batch}""".split()
    words += ["--prompts", str(data / "prompts.txt")]
    if name == "spo":
        return [*words, f"--children={pictures}", "--start=1", "--threshold=0"]
    return [*words, f"--group_size={pictures}"]


def work_of(method: str, batch: int, scale: Scale) -> tuple[float, str]:
    """The number of items that a step of `at_size` learns from, and their unit; SPO's depends on what it keeps."""
    name = method.removesuffix("-full")
    if name == "dpo":
        return batch, "pairs"
    if name == "rankdpo":
        return max(1, batch // scale.pictures) * scale.pictures, "pictures"
    return scale.prompts * min(scale.pictures, batch), f"pictures of {scale.steps} steps"


def make_data(folder: Path, resolution: int, pictures: int, count: int = 16) -> Path:
    """Random pictures as pairs and as rankings, and prompts."""
    from diffusion_align.data import write_pairs_parquet
    from diffusion_align.data.images import encode_png

    folder.mkdir(parents=True, exist_ok=True)
    source = torch.Generator().manual_seed(0)
    small = [torch.rand(3, 32, 32, generator=source) for _ in range(pictures)]
    files = [encode_png(torch.nn.functional.interpolate(p[None], resolution)[0]) for p in small]
    captions = [f"a picture of number {i}" for i in range(count)]
    write_pairs_parquet(
        folder / "pairs.parquet", captions, [files[0]] * count, [files[1]] * count, [1.0, 0.0] * (count // 2)
    )
    for i, picture in enumerate(files):
        (folder / f"{i}.png").write_bytes(picture)
    names = [f"{i}.png" for i in range(pictures)]
    relevance = [1 - i / (pictures - 1) for i in range(pictures)]
    rows = [json.dumps({"prompt": caption, "images": names, "relevance": relevance}) for caption in captions]
    (folder / "rankings.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(captions), encoding="utf-8")
    return folder
