"""Step tables with noise only in a few steps of a run."""

from __future__ import annotations

from dataclasses import replace

import torch

from .tables import StepTable


def noise_window(table: StepTable, quiet: StepTable, first: int, count: int) -> StepTable:
    """Steps first .. first + count - 1 of `table`, and the steps of `quiet` before and after them.

    Both are tables of the same grid, with eta > 0 and eta = 0. Their mixture is a valid sampler, because each step maps
    one noise level to the next, whatever came before; MixGRPO (Li et al. 2025, arXiv 2507.21802) trains on such runs.
    The reward of a trajectory then depends on the noise of few steps, so only these get credit for it.

    Raises ValueError for tables of different grids, a `quiet` table with noise, or a window without noise.
    """
    same = len(table) == len(quiet) and torch.equal(table.half_log_snr, quiet.half_log_snr)
    if not same or not torch.equal(table.order, quiet.order):
        raise ValueError("the two tables of a noise window must have the same grid and orders, and differ in eta only")
    if bool(quiet.stochastic.any()):
        raise ValueError("outside of a noise window steps are without noise: build that table with eta=0")
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
