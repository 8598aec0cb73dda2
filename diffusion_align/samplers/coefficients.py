"""One step's coefficients, in closed form.

The reverse equation, for u = x / alpha, in lambda = log(alpha / sigma), with eta for the amount of noise (0: the
probability-flow ODE, 1: the SDE of SDE-DPM-Solver++; Lu et al. 2022, arXiv 2211.01095, prop. 4.1 for the ODE) is

    du = -(1 + eta^2) (u - m) dlambda + sqrt(2) eta exp(-lambda) dW

and is solved exactly over a step with the clean prediction m interpolated in lambda from the steps before.
Python floats throughout: at h = 0.001, float32 would get the third-order coefficient wrong by tens of percent.
"""

from __future__ import annotations

import math

Row = tuple[float, list[float], float, int]
"""cx, (c0, c1, c2), std, order"""


def phi(order: int, z: float) -> float:
    """The exponential integrators' weights for z in [0, inf].

        phi_1 = e^-z - 1        phi_2 = phi_1 / z + 1        phi_3 = phi_2 / z - 1/2

    A Taylor series below 0.1, where the quotients cancel.
    """
    if order == 1:
        return math.expm1(-z)
    if z < 0.1:
        sign = 1.0 if order == 2 else -1.0
        return sign * sum(-((-z) ** j) / math.factorial(j + order - 1) for j in range(1, 13))
    return phi(2, z) / z - 0.5 if order == 3 else phi(1, z) / z + 1.0


def dpmpp_row(
    s: float, a_next: float, s_next: float, h: float, eta: float, ratios: list[float], form: str, third: float
) -> Row:
    """One multistep DPM-Solver++ row from noise level s to (a_next, s_next), h away in half log-SNR (inf allowed).

    `ratios` are the lengths of the last steps over h, newest first: none, one or two, for order 1, 2 or 3.
    `form` "midpoint" or "heun" is the second order's; `third` multiplies the curvature of the third (exact: 2).
    """
    kappa_h = (1 + eta**2) * h
    decay = 0.0 if eta == 0 else eta**2 * h  # 0 * inf is nan
    cx, std = s_next / s * math.exp(-decay), s_next * math.sqrt(-math.expm1(-2 * decay))
    c0, c1, c2 = -a_next * phi(1, kappa_h), 0.0, 0.0
    if len(ratios) == 1:
        slope = -0.5 * a_next * phi(1, kappa_h) if form == "midpoint" else a_next * phi(2, kappa_h)
        c0, c1 = c0 + slope / ratios[0], -slope / ratios[0]
    elif len(ratios) == 2:
        # With P, Q the newest and the older divided difference, the step adds  newer * P + older * Q.
        r0, r1 = ratios
        slope, bend = a_next * phi(2, kappa_h), -third * a_next * phi(3, kappa_h)
        newer = (slope * (2 * r0 + r1) + bend) / (r0 + r1)
        older = -(slope * r0 + bend) / (r0 + r1)
        c0, c1, c2 = c0 + newer / r0, older / r1 - newer / r0, -older / r1
    return cx, [c0, c1, c2], std, 1 + len(ratios)


def ddim_row(a: float, s: float, a_next: float, s_next: float, h: float, eta: float) -> Row:
    """One DDIM row from level (a, s) to (a_next, s_next), h away in half log-SNR.

    Song et al. 2021, DDIM (arXiv 2010.02502), eq. 12, with the deviation of eq. 16 written in h.
    """
    kept = -math.expm1(-2 * h)  # the posterior's variance over s_next^2
    cx = s_next / s * math.sqrt(1 - eta**2 * kept)
    return cx, [a_next - cx * a, 0.0, 0.0], eta * s_next * math.sqrt(kept), 1
