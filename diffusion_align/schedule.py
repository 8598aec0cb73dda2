"""Noise schedules: the amounts of signal and noise in a state at a given network time.

A noisy state is `x = alpha(t) * clean + sigma(t) * noise`, and `half_log_snr(t) = log(alpha / sigma)` is the time
variable of solvers (lambda in Lu et al. 2022, DPM-Solver, arXiv 2206.00927). Two kinds exist:

    "vp"     alpha^2 + sigma^2 = 1, from a table of betas; t is an index into the table, 0 .. N - 1
    "flow"   alpha + sigma = 1, rectified flow; t = N * sigma, 0 .. N

Everything is float64, because 1 - alpha^2 near t = 0 loses four digits in float32, and on the CPU, because not every
device has float64 (Apple's MPS has none).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import logsigmoid

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# The largest noise level of a zero-terminal-SNR table for grids in noise level: alpha^2 = 2^-24, the smallest positive
# half-precision number, by which diffusers too replaces zero.
ZERO_SNR_FLOOR = -12.0 * math.log(2.0)


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule; make it with `Schedule.from_config`.

    Fields: `kind`, `num_timesteps` N, `prediction_type` (what the network puts out), and what time grids need to know:
    `table` (half log-SNR at t = 0 .. N - 1, float64, finite; empty for flow), `zero_terminal` (t = N - 1 is pure
    noise), `shift` (flow), `steps_offset` (of "leading" grids), `lambda_min_clipped` (grids in t start above it).
    """

    kind: Literal["vp", "flow"]
    num_timesteps: int
    prediction_type: str
    table: torch.Tensor
    zero_terminal: bool = False
    shift: float = 1.0
    steps_offset: int = 0
    lambda_min_clipped: float = -math.inf

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, shift: float | None = None) -> Schedule:
        """The schedule of a diffusers scheduler config (a `scheduler_config.json`, or `scheduler.config`).

        Only the noise levels are read, with diffusers' defaults for absent keys. Choices of the grid in the config
        (`timestep_spacing`, `use_karras_sigmas`, ...) are ignored: the grid is an argument of `step_table`.
        `shift` replaces the config's own shift of a flow grid; a config with `use_dynamic_shifting` needs it, as
        exp(mu) for the size of the pictures.

        Raises ValueError for configs whose noise levels are of neither kind (EDM), or which name an unknown schedule.
        """
        # Configs in memory do not name their class; one with a shift and no betas is rectified flow too.
        flow = bool(config.get("use_flow_sigmas")) or ("shift" in config and "beta_schedule" not in config)
        flow = flow or str(config.get("_class_name", "")).startswith("FlowMatch")
        prediction_type = config.get("prediction_type") or ("flow_prediction" if flow else "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is one of {PREDICTION_TYPES}, not {prediction_type!r}")
        if flow:
            n, flow_shift = int(config.get("num_train_timesteps", 1000)), _flow_shift(config, shift)
            return cls("flow", n, prediction_type, torch.empty(0, dtype=torch.float64), shift=flow_shift)
        if shift is not None:
            raise ValueError("shift is for flow schedules, and this config describes a variance-preserving one")
        if "sigma_data" in config or ("sigma_max" in config and "beta_schedule" not in config):
            raise ValueError("EDM and variance-exploding schedulers (sigma_data, sigma_max) are not supported")
        betas = betas_of(config)
        if config.get("rescale_betas_zero_snr"):
            betas = rescale_to_zero_terminal_snr(betas)
        table = _half_log_snr_of(betas)
        zero_terminal = bool(table[-1] == -math.inf)
        if zero_terminal:
            # A table must be strictly falling; DDPM's linear betas are below the floor already one step earlier.
            before = float(table[-2])
            table[-1] = ZERO_SNR_FLOOR if before > ZERO_SNR_FLOOR else before - math.log(2.0)
        offset, clip = int(config.get("steps_offset") or 0), config.get("lambda_min_clipped")
        clip = -math.inf if clip is None else float(clip)
        return cls("vp", len(table), prediction_type, table, zero_terminal, 1.0, offset, clip)

    def alpha(self, t: torch.Tensor | float) -> torch.Tensor:
        """Signal level at network time t: float64 on the CPU, shape of t. Raises ValueError outside the schedule."""
        return self.levels(self.half_log_snr(t))[0]

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """Noise level at network time t: float64 on the CPU, shape of t. Raises ValueError outside the schedule."""
        return self.levels(self.half_log_snr(t))[1]

    def half_log_snr(self, t: torch.Tensor | float) -> torch.Tensor:
        """log(alpha / sigma) at network time t: float64 on the CPU, shape of t. -inf is pure noise, +inf is clean.

        Between the integers of a table it is linear in t, as diffusers' `sigma_to_t` has it.
        Raises ValueError for a t outside 0 .. N - 1 (vp) or 0 .. N (flow).
        """
        t = torch.as_tensor(t).cpu().to(torch.float64)
        last = self.num_timesteps if self.kind == "flow" else self.num_timesteps - 1
        if not bool(((t >= 0) & (t <= last)).all()):
            raise ValueError(f"a timestep lies outside 0 .. {last}, the range of this {self.kind} schedule")
        if self.kind == "flow":
            level = t / self.num_timesteps
            return torch.log1p(-level) - torch.log(level)
        table = self.table
        below = t.floor().long().clamp(max=self.num_timesteps - 2)
        value = torch.lerp(table[below], table[below + 1], t - below)
        return torch.where(t == last, -math.inf, value) if self.zero_terminal else value

    def timestep_at(self, half_log_snr: torch.Tensor) -> torch.Tensor:
        """The inverse of `half_log_snr`: network time, float64 on the CPU, clamped to the ends of a table."""
        lam = half_log_snr.cpu().to(torch.float64)
        if self.kind == "flow":
            return self.num_timesteps * torch.sigmoid(-lam)
        falling = self.table
        above = torch.searchsorted(-falling, -lam.contiguous()).clamp(1, self.num_timesteps - 1)
        below = above - 1
        fraction = (falling[below] - lam) / (falling[below] - falling[above])
        return below + fraction.clamp(0.0, 1.0)

    def levels(self, half_log_snr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, sigma) at a half log-SNR, same shape, exact at both infinities."""
        if self.kind == "flow":
            return torch.sigmoid(half_log_snr), torch.sigmoid(-half_log_snr)
        # exp(logsigmoid / 2) is accurate where sqrt(1 - alpha^2) is not.
        return torch.exp(0.5 * logsigmoid(2 * half_log_snr)), torch.exp(0.5 * logsigmoid(-2 * half_log_snr))


def betas_of(config: Mapping[str, Any]) -> torch.Tensor:
    """The betas [N], float64, of a diffusers scheduler config (before any rescaling).

    "linear" is Ho et al. 2020 (DDPM, arXiv 2006.11239, sec. 4); "scaled_linear" is linear in sqrt(beta), Stable
    Diffusion's; "squaredcos_cap_v2" is Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 17), capped at 0.999.
    Raises ValueError for another name, or for betas that are not in (0, 1) (the last one may be 1).
    """
    n = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    name = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64).flatten().clone()
    elif name == "linear":
        betas = torch.linspace(start, end, n, dtype=torch.float64)
    elif name == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), n, dtype=torch.float64) ** 2
    elif name == "squaredcos_cap_v2":
        signal = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"beta_schedule is one of {BETA_SCHEDULES} (or give trained_betas), not {name!r}")
    if len(betas) < 2 or not bool(((betas > 0) & (betas < 1))[:-1].all() and 0 < betas[-1] <= 1):
        raise ValueError("betas must be at least two numbers in (0, 1)")
    return betas


def rescale_to_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas [N] whose last step is pure noise: Lin et al. 2024 (arXiv 2305.08891), algorithm 1.

    sqrt(alpha_bar) is shifted to end at 0 and scaled to keep its first value.
    """
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    signal = root**2
    return 1 - torch.cat([signal[:1], signal[1:] / signal[:-1]])


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Flow noise levels moved towards noise for larger pictures: Esser et al. 2024 (arXiv 2403.03206), eq. 23."""
    return sigma / (sigma + (1 - sigma) / shift)  # written so that 1 stays exactly 1


def _half_log_snr_of(betas: torch.Tensor) -> torch.Tensor:
    log_signal = torch.cumsum(torch.log1p(-betas), 0)  # log(alpha^2); expm1 below keeps sigma^2 exact near t = 0
    return 0.5 * (log_signal - torch.log(-torch.expm1(log_signal)))


def _flow_shift(config: Mapping[str, Any], shift: float | None) -> float:
    for key in ("shift_terminal", "invert_sigmas"):
        if config.get(key):
            raise ValueError(f"flow schedules with {key} are not supported")
    if shift is None and config.get("use_dynamic_shifting"):
        raise ValueError("this flow schedule shifts by picture size (use_dynamic_shifting): pass shift=exp(mu)")
    value = float(config.get("shift", config.get("flow_shift", 1.0)) if shift is None else shift)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"the shift of a flow schedule is a positive number, not {value}")
    return value
