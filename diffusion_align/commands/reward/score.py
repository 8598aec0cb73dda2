"""`reward score`: score picture files, one line each."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_align.commands.sources import read_prompts
from diffusion_align.data.images import FORMATS, ImageError, decode_image
from diffusion_align.data.rows.listing import entries_of
from diffusion_align.evaluation.picture_folder import METADATA
from diffusion_align.options.reward import RewardScore
from diffusion_align.rewards import RewardError, load_reward, one_each, prefetch
from diffusion_align.system.progress import progress_bar

ENDINGS = (".jpg", ".tif", *(f".{name.lower()}" for name in FORMATS))
Job = tuple[str, str, "Tensor | str"]  # path, prompt, and levels [3,H,W] uint8 or an error message


def reward_score(options: RewardScore) -> int:
    """Score pictures; see `RewardScore`."""
    o = options
    files = find_pictures(o.images)
    prompts = prompts_of(files, o)
    reward = load_reward(o.reward_spec, device=o.device, seed=o.seed)
    out = Path(o.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, scores, failed, spent = out.with_name(f".{out.name}.partial"), [], [], 0.0
    bar = progress_bar(total=len(files), desc=f"score {o.reward}", unit="picture")
    with partial.open("w", encoding="utf-8") as file, bar:
        start = time.perf_counter()
        # The next pictures are decoded while the reward scores.
        for batch in prefetch(batches(files, prompts, o.batch_size)):
            for row in score_batch(str(o.reward_spec), reward, batch):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                (scores if row["score"] is not None else failed).append(row)
            bar.update(len(batch))
        spent = time.perf_counter() - start
    if not scores:
        partial.unlink()
        raise RewardError(f"none of {len(files)} pictures has a score: {failed[0]['error']}")
    os.replace(partial, out)
    values = torch.tensor([row["score"] for row in scores], dtype=torch.float64)
    error = f" +- {values.std().item() / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    print(f"{o.reward}: mean {values.mean().item():.4f}{error} over {len(values)} pictures, {len(files) / spent:.1f}/s")
    if failed:
        print(f"{len(failed)} pictures have no score; the first: {failed[0]['image']}: {failed[0]['error']}")
    print(f"{out}: one line a picture")
    return 0


def find_pictures(places: tuple[str, ...]) -> list[Path]:
    """The picture files at `places`, files or folders; those of a folder are sorted by name. A folder in GenEval's
    layout gives 00000/samples/0000.png and so on.

    Raises:
        FileNotFoundError: a place does not exist, or is a folder without pictures.
    """
    found: list[Path] = []
    for place in map(Path, places):
        inside = _pictures(place) or [path for one in entries_of(place) for path in _pictures(one / "samples")]
        if not inside and not place.is_file():
            raise FileNotFoundError(f"{place}: " + ("has no picture" if place.is_dir() else "no such file or folder"))
        found += inside or [place]
    return found


def _pictures(folder: Path) -> list[Path]:
    return [path for path in entries_of(folder) if path.suffix.lower() in ENDINGS]


def prompts_of(files: list[Path], o: RewardScore) -> list[str]:
    """A prompt for each picture, from the file of prompts (one a picture, or one for all), from samples.json, or from
    metadata.jsonl in GenEval's layout. Rewards that do not read prompts may do without.

    Raises:
        ValueError: there are more or fewer prompts than pictures, or a picture is not in samples.json.
        FileNotFoundError: there is neither a file of prompts nor one of these beside the pictures.
    """
    if o.prompts_file is not None:
        prompts = read_prompts(o.prompts_file)
        if len(prompts) not in (1, len(files)):
            raise ValueError(
                f"{o.prompts_file}: {len(prompts)} prompts for {len(files)} pictures; one each, or one for all"
            )
        return prompts if len(prompts) > 1 else prompts * len(files)
    known: dict[Path, str] = {}
    for folder in {path.parent for path in files}:
        listing, metadata = folder / "samples.json", folder.parent / METADATA
        if listing.is_file():
            known |= _listed_prompts(listing)
        elif folder.name == "samples" and metadata.is_file():
            known |= dict.fromkeys((path for path in files if path.parent == folder), read_prompts(str(metadata))[0])
        elif o.reward_spec.reads_prompts:
            raise FileNotFoundError(f"which prompts? --prompts_file FILE with one a line; there is no {listing} either")
    missing = [path for path in files if path not in known]
    if missing and o.reward_spec.reads_prompts:
        raise ValueError(f"{missing[0]} is not in its folder's samples.json; give --prompts_file")
    return [known.get(path, "") for path in files]


def _listed_prompts(listing: Path) -> dict[Path, str]:
    """The prompts of the pictures that `sample` has listed."""
    try:
        rows = json.loads(listing.read_text("utf-8"))["pictures"]
        return {listing.parent / row["file"]: row["prompt"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{listing} is not what `sample` writes ({error}); give --prompts_file") from error


def batches(files: list[Path], prompts: list[str], size: int) -> Iterator[list[Job]]:
    """Decoded pictures, up to `size` of one height and width; a broken picture has an error message instead."""
    batch: list[Job] = []
    for path, prompt in zip(files, prompts, strict=True):
        job = (str(path), prompt, _levels(path))
        if batch and (len(batch) == size or _shape(batch[-1]) != _shape(job)):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _shape(job: Job) -> Any:
    return job[2].shape if isinstance(job[2], Tensor) else None


def _levels(path: Path) -> Tensor | str:
    try:
        return torch.from_numpy(np.array(decode_image(path.read_bytes()))).permute(2, 0, 1)
    except (ImageError, OSError) as error:
        return f"{error}"


def score_batch(name: str, reward: Any, batch: list[Job]) -> Iterator[dict[str, Any]]:
    """One row for each picture of a batch of one size; without a score, `score` is None and `error` says why."""
    pictures = [levels for _, _, levels in batch if isinstance(levels, Tensor)]
    if not pictures:
        yield from ({"image": path, "prompt": prompt, "score": None, "error": why} for path, prompt, why in batch)
        return
    prompts = [prompt for _, prompt, _ in batch]
    values = one_each(reward(torch.stack(pictures).float() / 255, prompts), len(batch), f"reward {name}")
    for (path, prompt, _), value in zip(batch, values.tolist(), strict=True):
        finite = math.isfinite(value)
        row: dict[str, Any] = {"image": path, "prompt": prompt, "score": value if finite else None}
        yield row if finite else row | {"error": "the reward gave no finite number"}
