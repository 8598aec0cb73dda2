"""SPO's loss on pairs of transitions (Liang et al. 2024, arXiv 2406.04314, eq. 5), a few at a time in the network."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffusion_align.gaussian import Gaussian
from diffusion_align.objectives import clamped, spo
from diffusion_align.samplers import StepTable, step_gaussian
from diffusion_align.tensors import widen
from diffusion_align.train.branches import Comparisons
from diffusion_align.train.method import Columns
from diffusion_align.train.runs import Bind


def learn_spo(
    pairs: Comparisons,
    policy: Bind,
    reference: Bind,
    table: StepTable,
    factor: float,
    *,
    beta: float,
    clip: float | None,
    per_dim: bool = True,
    at_once: int = 64,
) -> Columns:
    """Add the gradient of factor x the sum over pairs of SPO's loss; columns of the M pairs, `at_once` parents in the
    network.

    One policy and one reference evaluation a family, for its pairs share their parent; two of each a pair in segments
    of more than one step, where they do not; and where steps are of second order as many again, at the states before.
    Columns: loss; log_ratio_w, log_ratio_l of the step in nats; kl, mean of both sides; clamped_w, clamped_l; gap.
    """
    order = int(table.order[pairs.k.cpu()].max())
    unit = pairs.dims if per_dim else 1
    parts = []
    for rows in _whole_families(pairs, at_once):
        with torch.no_grad():
            frozen = _steps(reference, table, pairs, rows, order)
        live = _steps(policy, table, pairs, rows, order)
        after = widen(pairs.child[:, rows])
        win, lose = (now.log_ratio(then, x) / unit for now, then, x in zip(live, frozen, after, strict=True))
        losses = spo(win, lose, beta, clip)
        (factor * losses.sum()).backward()
        columns = {
            "loss": losses,
            "log_ratio_w": win * unit,
            "log_ratio_l": lose * unit,
            "kl": sum(now.kl(then) for now, then in zip(live, frozen, strict=True)) / 2,
            "clamped_w": clamped(win, clip).float(),
            "clamped_l": clamped(lose, clip).float(),
            "gap": pairs.gap[rows],
        }
        parts.append({name: values.detach() for name, values in columns.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def pick_pairs(chunks: list[Comparisons], numbers: Tensor, at_once: int) -> list[Comparisons]:
    """Pairs by their numbers [m], rising, in the order of prompts and steps over all chunks (`Comparisons.by_prompt`).

    They are put together first and cut into parts of `at_once` families then, for of each chunk a step may take few.
    """
    parts, first, families = [], 0, 0
    for chunk in chunks:
        here = numbers[(numbers >= first) & (numbers < first + len(chunk))] - first
        if len(here):
            part = chunk.of(chunk.by_prompt()[here])
            _, family = part.family.unique_consecutive(return_inverse=True)
            parts.append(replace(part, family=family + families))
            families += int(family[-1]) + 1
        first += len(chunk)
    joined = {name: torch.cat([getattr(p, name) for p in parts], 1) for name in ("before", "parent", "child")}
    joined |= {name: torch.cat([getattr(p, name) for p in parts]) for name in ("k", "text", "gap", "family")}
    return replace(parts[0], **joined).cut(-(-families // at_once))


def _whole_families(pairs: Comparisons, at_once: int) -> list[Tensor]:
    """The pairs in parts of so many families; of so many pairs, where those of a family share nothing."""
    if not pairs.shared:
        return list(torch.arange(len(pairs)).split(at_once))
    _, sizes = pairs.family.cpu().unique_consecutive(return_counts=True)
    return list(torch.arange(len(pairs)).split([int(part.sum()) for part in sizes.split(at_once)]))


def _steps(bind: Bind, table: StepTable, pairs: Comparisons, rows: Tensor, order: int) -> tuple[Gaussian, Gaussian]:
    """The Gaussians of the winners' and of the losers' steps; one and the same where their parents are, which are then
    asked about once a family."""
    sides = 1 if pairs.shared else 2
    place, asked = torch.arange(len(rows)), rows
    if pairs.shared:
        _, place, sizes = pairs.family[rows].cpu().unique_consecutive(return_inverse=True, return_counts=True)
        asked = rows[sizes.cumsum(0) - sizes]
    k = pairs.k[asked].repeat(sides)
    denoise = bind(pairs.text[asked].repeat(sides, 1, 1))

    def clean_at(states: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        x = widen(states[:sides, asked].flatten(0, 1))
        return x, widen(denoise(x, table.gather("timesteps", k, x)))

    x, clean = clean_at(pairs.parent, k)
    earlier = clean_at(pairs.before, (k - 1).clamp(min=0))[1] if order > 1 else None
    mean, std = step_gaussian(table, k, x, clean, earlier)
    both = [Gaussian(m[place], s[place]) for m, s in zip(mean.chunk(sides), std.chunk(sides), strict=True)]
    return both[0], both[-1]
