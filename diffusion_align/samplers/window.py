"""Noise in a few steps of a run only: the others are those of the sampler's noise-free sibling."""

from __future__ import annotations

from dataclasses import replace

import torch

from .tables import StepTable


def noise_window(table: StepTable, quiet: StepTable, first: int, count: int) -> StepTable:
    """Steps first .. first + count - 1 of `table`, and the steps of `quiet` before and after them.

    The two are tables of one grid with eta > 0 and eta = 0. A mixture is a sampler too, for each step maps one noise
    level to the next whatever came before; MixGRPO (Li et al. 2025, arXiv 2507.21802) trains on such runs. What a run
    earns then depends on the noise of few steps, so its credit goes to few.

    Raises ValueError for tables of two grids, a `quiet` that is not, or a window without noise.
    """
    same = len(table) == len(quiet) and torch.equal(table.half_log_snr, quiet.half_log_snr)
    if not same or not torch.equal(table.order, quiet.order):
        raise ValueError("the two tables of a noise window must have the same grid and orders, and differ in eta only")
    if bool(quiet.stochastic.any()):
        raise ValueError("outside of a noise window steps are noise-free: build that table with eta=0")
    steps = torch.arange(len(table))
    inside = (steps >= first) & (steps < first + count)
    if count < 1 or int(inside.sum()) < count or not bool(table.stochastic[inside].all()):
        raise ValueError(f"steps {first} .. {first + count - 1} of {len(table)} do not all have noise")
    return replace(
        table,
        cx=torch.where(inside, table.cx, quiet.cx),
        c=torch.where(inside[:, None], table.c, quiet.c),
        std=torch.where(inside, table.std, quiet.std),
        stochastic=inside,
    )
