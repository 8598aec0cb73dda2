"""Step tables: all samplers are one linear kernel with different coefficients.

    x_{k+1} = cx x_k + c0 m_k + c1 m_{k-1} + c2 m_{k-2} + std z,        m_j the clean prediction at step j

The coefficients (`coefficients`) are computed once, in float64 on the CPU; a step gathers its own by index.
Papers: Lu et al. 2022, DPM-Solver++ (arXiv 2211.01095); Song et al. 2021, DDIM (arXiv 2010.02502).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffusion_align.vocabulary import SOLVERS

from ..schedule import Schedule
from ..time_grids import TimeGrid, time_grid
from .coefficients import Row, ddim_row, dpmpp_row

VARIANTS = ("midpoint", "heun")
THIRD_ORDERS = ("published", "exact")

# Two levels closer than this in half log-SNR are the same level (a grid may already end at sigma_min).
SAME_LEVEL = 1e-9
# Below this many steps the last ones use lower orders, for stability: diffusers' `lower_order_final`.
FEW_STEPS = 15


@dataclass(frozen=True, eq=False)
class StepTable:
    """The T steps of a sampler, float64 on the CPU. Stateless: any step can be computed by its index, in any batch.

    timesteps [T], the network's time; cx [T]; c [T,3], weights of the clean predictions m_k, m_{k-1}, m_{k-2}; std [T];
    order [T] int64, how many clean predictions the step uses; stochastic [T] bool, whether the step has a density;
    alpha, sigma, half_log_snr [T+1], the noise levels, of which the last is the end of the run.
    """

    timesteps: torch.Tensor
    cx: torch.Tensor
    c: torch.Tensor
    std: torch.Tensor
    order: torch.Tensor
    stochastic: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    half_log_snr: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    def indices(self, k: int | torch.Tensor, batch: int) -> torch.Tensor:
        """Step indices as [B] int64 on the CPU, from one number for all samples or one per sample.

        Raises ValueError for a shape other than [B] and IndexError outside 0 .. T - 1 (no counting from the end).
        """
        k = torch.as_tensor(k).cpu()
        if k.ndim == 0:
            k = k.expand(batch).clone()  # a strided min is slow
        if k.shape != (batch,) or k.is_floating_point() or k.dtype == torch.bool:
            raise ValueError(f"k is an integer or [{batch}] integers, one per sample, not {list(k.shape)} {k.dtype}")
        if batch and not (0 <= int(k.min()) and int(k.max()) < len(self)):
            raise IndexError(f"step index {k.tolist()} is outside 0 .. {len(self) - 1}")
        return k.long()

    def gather(self, name: str, k: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Field `name` at each sample's step: [B], or [B,3] for "c", on the device of `like` [B,...].

        Floating fields come in the dtype of `like`, float32 at least (float64 stays). Errors as in `indices`.
        """
        values = getattr(self, name)[self.indices(k, like.shape[0])]
        dtype = torch.promote_types(like.dtype, torch.float32) if values.is_floating_point() else values.dtype
        return values.to(dtype).to(like.device)  # in this order: the device may have no float64


def step_table(
    schedule: Schedule,
    steps: int,
    *,
    solver: str = "dpmpp",
    order: int = 2,
    eta: float = 1.0,
    spacing: str = "trailing",
    final: str = "zero",
    variant: str = "midpoint",
    third_order: str = "published",
) -> StepTable:
    """The table of a sampler on a schedule: `solver_table` on the `time_grid` of the same arguments.

    "leading" and "linspace" grids are laid as the solver's diffusers scheduler lays them (see `time_grid`).
    Raises ValueError for names, numbers and combinations that do not exist.
    """
    grid = time_grid(schedule, steps, spacing, final, drop_last=solver != "ddim")
    return solver_table(grid, solver=solver, order=order, eta=eta, variant=variant, third_order=third_order)


def solver_table(
    grid: TimeGrid,
    *,
    solver: str = "dpmpp",
    order: int = 2,
    eta: float = 1.0,
    variant: str = "midpoint",
    third_order: str = "published",
) -> StepTable:
    """The coefficients of a solver on a grid of noise levels.

    solver "dpmpp": multistep DPM-Solver++ (arXiv 2211.01095, prop. 4.1 and algorithm 2) with noise dial `eta` >= 0.
    The noise does not depend on the order. `variant` is how the second order integrates its slope: "midpoint" is the
    paper's algorithm 2, "heun" its Taylor form, the exact integral of a clean prediction that is linear in lambda.
    Order 3 needs eta = 0, because noise limits the weak order to that of order 2. `third_order` "published" is what the
    papers' code and diffusers compute: it has half of the second-derivative term and is therefore of second order.
    "exact" has the full term and is of third order (the same step as UniPC's predictor of order 3, arXiv 2302.04867).

    solver "ddim": always of order 1, `eta` in [0, 1] scales the posterior's deviation (arXiv 2010.02502, eq. 12 and
    16). At eta = 0 and eta = 1 it equals "dpmpp" of order 1, but not between.

    The first steps have lower order because they have less history. As in diffusers, the last one has order 1 if there
    are fewer than 15 steps or it ends without noise (below 15 steps, the last but one is at most second order). A
    history point of pure noise (sigma = 1 on flow) is infinitely far away and gives no slope, so the order is lower
    there too. A step between equal levels is left out, so the table may be one shorter than the grid.

    Raises ValueError for unknown names, numbers out of range, order 3 with noise, and levels that do not rise.
    """
    _validate(solver, order, eta, variant, third_order)
    count = len(grid.timesteps)
    rises = grid.half_log_snr.diff().nan_to_num(nan=0.0, posinf=math.inf)  # two equal infinities differ by nan
    if bool((rises < -SAME_LEVEL).any()):
        raise ValueError("the half log-SNR of a grid must rise from step to step")
    curvature = 2.0 if third_order == "exact" else 1.0
    steps = [k for k in range(count) if rises[k] > SAME_LEVEL]
    if not steps:
        raise ValueError("no step is left: every level of the grid is the same")
    levels = [*steps, count]
    alpha, sigma, lam = grid.alpha[levels], grid.sigma[levels], grid.half_log_snr[levels]
    gaps = lam.diff().tolist()
    ends_clean = math.isinf(float(lam[-1]))

    rows: list[Row] = []
    for k, position in enumerate(steps):
        a, s, a_next, s_next = (float(v) for v in (alpha[k], sigma[k], alpha[k + 1], sigma[k + 1]))
        if solver == "ddim":
            rows.append(ddim_row(a, s, a_next, s_next, gaps[k], eta))
            continue
        usable = min(order, k + 1, _order_allowed(position, count, ends_clean))
        back = gaps[max(k - usable + 1, 0) : k][::-1]  # lambda_k - lambda_{k-1}, then one further back
        finite = next((i for i, gap in enumerate(back) if math.isinf(gap)), len(back))
        ratios = [gap / gaps[k] for gap in back[:finite]]
        # At order 3, a second-order step after pure noise is the limit of the third-order step: the Taylor form.
        form = "heun" if usable == 3 and finite == 1 else variant
        rows.append(dpmpp_row(s, a_next, s_next, gaps[k], eta, ratios, form, curvature))
    cx, c, std, used = zip(*rows, strict=True)
    std = torch.tensor(std, dtype=torch.float64)
    return StepTable(
        timesteps=grid.timesteps[steps],
        cx=torch.tensor(cx, dtype=torch.float64),
        c=torch.tensor(c, dtype=torch.float64),
        std=std,
        order=torch.tensor(used),
        stochastic=std > 0,
        alpha=alpha,
        sigma=sigma,
        half_log_snr=lam,
    )


def _order_allowed(position: int, count: int, ends_clean: bool) -> int:
    """The highest order at a position of a grid of `count` steps: diffusers' `lower_order_final`."""
    if position == count - 1 and (count < FEW_STEPS or ends_clean):
        return 1
    return 2 if position == count - 2 and count < FEW_STEPS else 3


def _validate(solver: str, order: int, eta: float, variant: str, third_order: str) -> None:
    named = {"solver": (solver, SOLVERS), "variant": (variant, VARIANTS), "third_order": (third_order, THIRD_ORDERS)}
    for name, (value, allowed) in named.items():
        if value not in allowed:
            raise ValueError(f"{name} is one of {allowed}, not {value!r}")
    if order not in (1, 2, 3):
        raise ValueError(f"order is 1, 2 or 3, not {order!r}")
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta is a finite number of at least 0, not {eta!r}")
    if solver == "ddim" and eta > 1:
        raise ValueError(f"DDIM's eta is at most 1, not {eta!r}")
    if solver == "dpmpp" and order == 3 and eta > 0:
        raise ValueError("order 3 has no stochastic form here: use eta=0, or order 2")
