"""Labels of the pairs of a step-aware model: those of the data, or from a reward's scores of the clean pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_align.data import Pair
from diffusion_align.data.disk import digest
from diffusion_align.data.images import decode_image
from diffusion_align.data.pairs_and_rankings import fingerprint
from diffusion_align.data.rows.raw_rows import read_bytes
from diffusion_align.rewards import Reward
from diffusion_align.rewards.spec import RewardSpec
from diffusion_align.system.progress import progress_bar

CHUNK = 16  # pairs whose pictures are in memory at a time


def own_labels(pairs: Sequence[Pair]) -> Tensor:
    """[N] float64: 1 if the first picture was preferred, 0.5 for a tie."""
    return torch.tensor([0.5 if pair.tie else 1.0 for pair in pairs], dtype=torch.float64)


def labels_of_scores(scores: Tensor, margin: float) -> Tensor:
    """Scores [N,2] -> labels [N]: 1 or 0, or 0.5 if the softmax probabilities p_0 and p_1 differ by at most `margin`.

    p_0 - p_1 = tanh((s_0 - s_1) / 2), so the scores must be logits, as PickScore's are. This is the rule of SPO's
    training code for SDXL, with a margin of 0.1.

    Raises:
        ValueError: a score that is not finite.
    """
    broken = int((~torch.isfinite(scores)).any(1).sum())
    if broken:
        raise ValueError(f"relabel: the reward has no finite score for {broken} of {len(scores)} pairs")
    gap = torch.tanh((scores[:, 0].double() - scores[:, 1].double()) / 2)
    return torch.where(gap > margin, 1.0, torch.where(gap < -margin, 0.0, 0.5)).double()


def describe_labels(reward: str, own: Tensor, labels: Tensor, margin: float) -> str:
    """One line: how many labels of the data a reward confirmed and flipped, and how many ties it decided and made."""
    decided = own != 0.5
    same, flipped = (int((decided & (labels == side)).sum()) for side in (1.0, 0.0))
    new = int((~decided & (labels != 0.5)).sum())
    ties = int((labels == 0.5).sum())
    was = f", {new} ties of the data decided" if (~decided).any() else ""
    return (
        f"labels: {reward} on {len(labels)} pairs: {same} as the data has them, {flipped} flipped{was}, {ties} ties "
        f"(probabilities within {margin:g})"
    )


def scores_of_pairs(
    reward: RewardSpec, pairs: Sequence[Pair], folder: Path, load: Callable[[], Reward], *, progress: bool = False
) -> Tensor:
    """Scores [N,2] float64 of the pairs' clean pictures, uncropped and at their own size, by a reward.

    They are kept in `folder`, one line per pair, in a file named by reward and pairs: a second call reads them, and
    continues after an interruption. `load` loads the reward and is called only if a score is missing.

    Raises:
        ValueError: a picture that cannot be decoded; whatever the reward raises.
    """
    file = folder / f"scores-{digest((_identity(reward) + fingerprint(pairs)).encode())}.jsonl"
    known = _lines(file)
    if len(known) < len(pairs):
        loaded = load()
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{json.dumps(row)}\n" for row in known), encoding="utf-8")
        with file.open("a", encoding="utf-8") as out:
            starts = range(len(known), len(pairs), CHUNK)
            for start in progress_bar(starts, desc=f"score by {reward}", unit="chunk", hidden=not progress):
                rows = _scored(pairs[start : start + CHUNK], loaded)
                out.write("".join(f"{json.dumps(row)}\n" for row in rows))
                out.flush()
                known += rows
    return torch.tensor(known[: len(pairs)], dtype=torch.float64).view(-1, 2)


def _identity(reward: RewardSpec) -> str:
    """The text of the reward, and the content of the file of a Python reward."""
    files = [part.at.rpartition(":")[0] for part in reward.parts if part.kind == "python"]
    return reward.text + "".join(digest(Path(file).read_bytes()) for file in files)


def _lines(file: Path) -> list[list[float]]:
    """The rows of a file, without a torn last line."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _scored(pairs: Sequence[Pair], reward: Reward) -> list[list[float]]:
    """Two scores per pair. Pictures of one size are scored together."""
    pictures = [_picture(pair, side) for pair in pairs for side in (0, 1)]
    places: dict[torch.Size, list[int]] = {}
    for place, picture in enumerate(pictures):
        places.setdefault(picture.shape, []).append(place)
    scores = [0.0] * len(pictures)
    for rows in places.values():
        found = reward(torch.stack([pictures[row] for row in rows]), [pairs[row // 2].prompt for row in rows])
        for row, score in zip(rows, found.tolist(), strict=True):
            scores[row] = score
    return [scores[i : i + 2] for i in range(0, len(scores), 2)]


def _picture(pair: Pair, side: int) -> Tensor:
    """A picture of a pair, float32 [3,H,W] in [0, 1]."""
    try:
        image = decode_image(read_bytes(pair.pictures[side]))
    except (ValueError, OSError) as error:
        raise ValueError(f"pair {pair.id}: picture {side} {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div_(255.0)
