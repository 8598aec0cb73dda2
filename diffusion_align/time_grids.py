"""Time grids: the noise levels of a sampler, from noisy to clean, and the network time at each."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .schedule import Schedule, shift_sigma
from .vocabulary import FINALS, IN_TIME, SPACINGS

# Sabour et al. 2024, Align Your Steps (arXiv 2404.14507): the ten steps tuned for each model, as network times.
AYS = {
    "ays": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "ays_sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}
KARRAS_RHO = 7.0
ON_FLOW = ("linspace", "trailing", "flow")


class TimeGrid(NamedTuple):
    """T steps between T + 1 noise levels, float64 on the CPU. The last step ends at the last level."""

    timesteps: torch.Tensor  # [T] network time at each step's start
    half_log_snr: torch.Tensor  # [T+1] rising
    alpha: torch.Tensor  # [T+1]
    sigma: torch.Tensor  # [T+1]


def time_grid(
    schedule: Schedule, steps: int, spacing: str = "trailing", final: str = "zero", *, drop_last: bool = True
) -> TimeGrid:
    """`steps` noise levels to evaluate the network at, and the level to end on.

    On a vp schedule of N training steps (the first three are table 2 of Lin et al. 2024, arXiv 2305.08891):

        linspace      t uniform from N - 1 to 0, rounded
        leading       t multiples of N // steps, plus the config's steps_offset
        trailing      t = N, N - N/steps, ... rounded, minus 1: always starts at N - 1
        karras        (sigma/alpha)^(1/7) uniform: Karras et al. 2022 (arXiv 2206.00364), eq. 5
        lu            half log-SNR uniform: Lu et al. 2022 (arXiv 2206.00927)
        exponential   another name of lu: log(sigma/alpha) uniform
        ays           Align Your Steps for SD1.5 (arXiv 2404.14507); other than 10 steps: log-linear interpolation
        ays_sdxl      the same for SDXL

    From karras on, times are fractional: the network gets the time of the state's noise level. diffusers rounds that
    time (truncates it, for exponential) but keeps the level, so the two differ by up to half a training step there.
    `drop_last`: as diffusers' multistep solvers do for linspace and leading, take steps + 1 points and drop the
    cleanest. DDIM does not (leading is then multiples of N // steps instead of N // (steps + 1)).

    On a flow schedule, with its shift applied, sigma uniform before the shift, times fractional (N * sigma):

        trailing      1, 1 - 1/steps, ... 1/steps: starts at pure noise (the grid of the Flux pipelines)
        linspace      from 1 to the shifted 1/N: `FlowMatchEulerDiscreteScheduler`, which shifts its end twice
        flow          from 1 - 1/N towards 0: `DPMSolverMultistepScheduler(use_flow_sigmas=True)`

    `final` is "zero" (without noise) or "sigma_min" (the level of t = 0; on flow, of the shifted 1/N). If a grid
    already ends at sigma_min, that level is repeated; `solver_table` leaves the empty step out.

    Raises ValueError for an unknown name, a spacing that the schedule has not, or steps that do not fit.
    """
    known = (*SPACINGS, "flow")
    if spacing not in known:
        raise ValueError(f"spacing is one of {known}, not {spacing!r}")
    if final not in FINALS:
        raise ValueError(f"final is one of {FINALS}, not {final!r}")
    n = schedule.num_timesteps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= n:
        raise ValueError(f"steps is an integer in 1 .. {n}, not {steps!r}")
    if schedule.kind == "flow":
        times, lam, end = _flow_grid(schedule, steps, spacing)
    elif spacing == "flow":
        raise ValueError("spacing 'flow' needs a flow schedule, and this one is variance-preserving")
    elif spacing in IN_TIME:
        times = _times(schedule, steps, spacing, drop_last)
        if times[0] > n - 1:
            raise ValueError(f"{steps} {spacing} steps with offset {schedule.steps_offset} start beyond t = {n - 1}")
        lam, end = schedule.half_log_snr(times), schedule.table[0]
    else:
        times = schedule.timestep_at(_noise_levels(schedule, steps, spacing))
        lam, end = schedule.half_log_snr(times), schedule.table[0]
    last = torch.tensor(math.inf, dtype=torch.float64) if final == "zero" else end
    lam = torch.cat([lam, last.reshape(1)])
    return TimeGrid(times, lam, *schedule.levels(lam))


def _times(schedule: Schedule, steps: int, spacing: str, drop_last: bool) -> torch.Tensor:
    """Integer network times [T] of the grids that are uniform in t."""
    # Grids start above lambda_min_clipped, below which a cosine schedule has almost no signal.
    last = int((schedule.table >= schedule.lambda_min_clipped).sum())
    if last < steps:
        raise ValueError(f"lambda_min_clipped leaves {last} timesteps, fewer than the {steps} steps asked for")
    if spacing == "trailing":
        return (last - torch.arange(steps, dtype=torch.float64) * (last / steps)).round() - 1
    points = torch.arange(steps + drop_last, dtype=torch.float64)
    if spacing == "leading":
        stride = last // (steps + drop_last)
        if stride == 0:
            raise ValueError(f"{steps} leading steps do not fit into {last} timesteps")
        points = points * stride + schedule.steps_offset
    else:
        points = (points * ((last - 1) / max(steps + drop_last - 1, 1))).round()
    points = points.flip(0)
    return points[:-1] if drop_last else points


def _noise_levels(schedule: Schedule, steps: int, spacing: str) -> torch.Tensor:
    """Half log-SNR [T] of the grids in noise level, from the noisiest to the cleanest level of the table."""
    if spacing in AYS:
        if schedule.num_timesteps != 1000:
            raise ValueError("the Align Your Steps lists are times of a 1000-step schedule")
        tuned = schedule.table[torch.tensor((*AYS[spacing], 0))]
        place = torch.arange(steps, dtype=torch.float64) * ((len(tuned) - 1) / steps)
        below = place.floor().long()
        return torch.lerp(tuned[below], tuned[below + 1], place - below)
    noisy, clean = schedule.table[-1], schedule.table[0]
    ramp = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    if spacing == "karras":
        lam = -KARRAS_RHO * torch.log(torch.lerp(torch.exp(-noisy / KARRAS_RHO), torch.exp(-clean / KARRAS_RHO), ramp))
    else:
        lam = torch.lerp(noisy, clean, ramp)
    lam[-1], lam[0] = clean, noisy  # exactly, without rounding: the ends are entries of the table
    return lam


def _flow_grid(schedule: Schedule, steps: int, spacing: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Network times [T], half log-SNR [T] and the half log-SNR of sigma_min for a rectified-flow schedule."""
    n, shift = schedule.num_timesteps, schedule.shift
    least = shift_sigma(torch.tensor(1.0 / n, dtype=torch.float64), shift)
    if spacing == "trailing":
        even = 1 - torch.arange(steps, dtype=torch.float64) / steps
    elif spacing == "linspace":
        even = torch.linspace(1.0, float(least), steps, dtype=torch.float64)
    elif spacing == "flow":
        even = (1 - 1 / n) * (1 - torch.arange(steps, dtype=torch.float64) / steps)
    else:
        raise ValueError(f"a flow schedule has the spacings {ON_FLOW}, not {spacing!r}")
    times = n * shift_sigma(even, shift)
    return times, schedule.half_log_snr(times), schedule.half_log_snr(n * least)
