"""Scores of pictures: rewards and judges over a stream of batches, each result checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..rewards import Reward, one_each
from .picture_folder import Batch

Judge = Callable[[Tensor, list[str]], Mapping[str, Tensor]]


def _checked(values: Tensor, name: str, indices: list[int], *, may_be_nan: bool) -> Tensor:
    values = one_each(values, len(indices), name)
    bad = ~(torch.isfinite(values) | (values.isnan() if may_be_nan else torch.zeros_like(values, dtype=torch.bool)))
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{name} returned {values[first].item()} for the picture of prompt {indices[first]}")
    return values


def score(
    batches: Iterable[Batch],
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    *,
    judges: Mapping[str, Judge] | None = None,
) -> dict[str, Tensor]:
    """Score every picture once with every reward and judge.

    Args:
        batches: indices of b prompts and their pictures [b,3,H,W] in [0, 1], as `generate` and `read_pictures` yield
            them.
        prompts: N prompts; the indices point into this list.
        rewards: named functions `(images, prompts) -> [b]`, finite.
        judges: named functions `(images, prompts) -> {attribute: [b]}`, NaN where an attribute does not apply to a
            prompt; the attribute "all" is whether the whole prompt holds.

    Returns:
        A float32 tensor [N] on the CPU for each reward, under its name, and for each attribute, under
        "judge/attribute".

    Raises:
        ValueError: a result of the wrong shape or not finite, attributes that differ between batches, a picture that
            is missing or given twice, or a name with a "/".
    """
    if any("/" in name for name in (*rewards, *(judges or {}))):
        raise ValueError('names of rewards and judges have no "/", which stands between a judge and its attribute')
    found: dict[str, Tensor] = {}
    seen = torch.zeros(len(prompts), dtype=torch.int64)
    for indices, images in batches:
        if len(indices) != len(images) or not all(0 <= i < len(prompts) for i in indices):
            raise ValueError(f"a batch of {len(images)} pictures has indices {indices} into {len(prompts)} prompts")
        texts = [prompts[i] for i in indices]
        values: dict[str, Tensor] = {}
        for name, reward in rewards.items():
            values[name] = _checked(reward(images, texts), name, indices, may_be_nan=False)
        for name, judge in (judges or {}).items():
            for attribute, verdict in judge(images, texts).items():
                key = f"{name}/{attribute}"
                values[key] = _checked(verdict, key, indices, may_be_nan=True)
        if not found:
            found = {key: torch.full((len(prompts),), torch.nan) for key in values}
        if found.keys() != values.keys():
            raise ValueError(f"batches disagree about {sorted(found.keys() ^ values.keys())}")
        for key, value in values.items():
            found[key][indices] = value
        seen += torch.bincount(torch.tensor(indices, dtype=torch.int64), minlength=len(prompts))
    if not (seen == 1).all():
        first = int((seen != 1).nonzero()[0])
        raise ValueError(f"{int((seen != 1).sum())} prompts have no picture or several; the first is number {first}")
    return found
