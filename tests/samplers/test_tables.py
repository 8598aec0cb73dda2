"""Step tables: exact integrals, the posterior of DDPM, hand arithmetic; then the identities every row obeys."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from helpers_samplers import SD15, flow_grid, lambda_uniform, noise, uneven_lambda, vp_grid, walk
from scipy.integrate import quad

from diffusion_align.samplers import step_gaussian, step_table
from diffusion_align.samplers.coefficients import phi
from diffusion_align.samplers.tables import solver_table
from diffusion_align.schedule import Schedule

STABLE = Schedule.from_config(SD15)
FLOW3 = Schedule.from_config({"use_flow_sigmas": True, "flow_shift": 3.0})
ZERO_SNR = Schedule.from_config({**SD15, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})

# (solver, order, eta, variant, third_order): everything that exists
KINDS = [
    *(("ddim", 1, eta, "midpoint", "published") for eta in (0.0, 0.3, 1.0)),
    *(
        ("dpmpp", order, eta, variant, "published")
        for order, eta, variant in itertools.product((1, 2), (0.0, 0.5, 1.0, 1.4), ("midpoint", "heun"))
    ),
    *(("dpmpp", 3, 0.0, "midpoint", third) for third in ("published", "exact")),
]


def kind(solver, order, eta, variant, third_order):
    return {"solver": solver, "order": order, "eta": eta, "variant": variant, "third_order": third_order}


def ends(table):
    return table.alpha[:-1], table.sigma[:-1], table.alpha[1:], table.sigma[1:]


# --- truths from outside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [1e-8, 1e-4, 1e-3, 0.03, 0.0999, 0.1, 0.7, 5.0, 60.0])
def test_phi_against_fifty_digits(z):
    getcontext().prec = 50
    d = Decimal(z)
    exact = [(-d).exp() - 1]
    exact.append(exact[0] / d + 1)
    exact.append(exact[1] / d - Decimal("0.5"))
    for order in (1, 2, 3):
        assert phi(order, z) == pytest.approx(float(exact[order - 1]), rel=1e-12)
    assert [phi(order, math.inf) for order in (1, 2, 3)] == [-1.0, 1.0, -0.5]


def test_why_the_table_is_float64():
    """The quotients that define phi_3, taken in float32 at h = 0.001, are wrong by tens of percent."""
    h = torch.tensor(1e-3)
    single = ((torch.expm1(-h) / h + 1) / h - 0.5) / phi(3, 1e-3) - 1
    assert abs(float(single)) > 0.1
    double = ((math.expm1(-1e-3) / 1e-3 + 1) / 1e-3 - 0.5) / phi(3, 1e-3) - 1
    assert abs(double) < 1e-8


@pytest.mark.parametrize(
    ("order", "variant", "degree", "eta"),
    [(1, "midpoint", 0, 0.5), (2, "heun", 1, 0.0), (2, "heun", 1, 0.5), (2, "heun", 1, 1.0), (3, "midpoint", 2, 0.0)],
)
def test_a_polynomial_clean_prediction_is_integrated_exactly(order, variant, degree, eta):
    """x' = cx x + kappa alpha' int exp(kappa (v - lambda')) m(v) dv by quadrature, on uneven steps."""
    lam = uneven_lambda(6)
    table = solver_table(vp_grid(lam), order=order, eta=eta, variant=variant, third_order="exact")
    kappa = 1 + eta**2

    def clean(v):
        return 0.7 - 0.4 * v * (degree > 0) + 0.9 * v**2 * (degree > 1)

    for k in range(degree, 4 + 1 - (degree > 1)):  # full order: past the start, before the lowered end
        assert int(table.order[k]) == order
        start, end = float(lam[k]), float(lam[k + 1])
        integral = quad(lambda v, end=end: kappa * math.exp(kappa * (v - end)) * clean(v), start, end, epsabs=1e-14)[0]
        history = [clean(float(lam[k - j])) if k >= j else 0.0 for j in range(3)]
        step = sum(float(table.c[k, j]) * history[j] for j in range(3))
        assert step == pytest.approx(float(table.alpha[k + 1]) * integral, abs=1e-13)


def test_published_third_order_has_half_of_the_curvature():
    """On m = lambda^2 the true share of the curvature is -2 alpha' h^2 phi_3(h); the published step has half of it."""
    lam, k = uneven_lambda(6), 3
    steps = {}
    for third in ("published", "exact"):
        table = solver_table(vp_grid(lam), order=3, eta=0, third_order=third)
        steps[third] = sum(float(table.c[k, j] * lam[k - j] ** 2) for j in range(3))
    h = float(lam[k + 1] - lam[k])
    half = -float(table.alpha[k + 1]) * h**2 * ((math.expm1(-h) / h + 1) / h - 0.5)
    assert steps["exact"] - steps["published"] == pytest.approx(half, rel=1e-9)
    assert half > 0


def test_eta_one_is_the_posterior_of_ddpm():
    """Ho et al. 2020 (arXiv 2006.11239), eq. 7, for one training step, from the betas alone."""
    schedule = Schedule.from_config({"num_train_timesteps": 4, "beta_start": 0.1, "beta_end": 0.4})
    beta = torch.linspace(0.1, 0.4, 4, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    before = bar[:-1].flip(0)  # steps 3 -> 2, 2 -> 1, 1 -> 0
    beta, bar = beta[1:].flip(0), bar[1:].flip(0)
    for options in ({"solver": "ddim"}, {"solver": "dpmpp", "order": 1}):
        table = step_table(schedule, 4, spacing="trailing", final="sigma_min", eta=1.0, **options)
        assert table.timesteps.tolist() == [3, 2, 1]  # the step 0 -> 0 is empty
        torch.testing.assert_close(table.c[:, 0], before.sqrt() * beta / (1 - bar), rtol=1e-13, atol=0)
        torch.testing.assert_close(table.cx, (1 - beta).sqrt() * (1 - before) / (1 - bar), rtol=1e-13, atol=0)
        torch.testing.assert_close(table.std**2, (1 - before) / (1 - bar) * beta, rtol=1e-13, atol=0)


def test_ddim_by_its_paper():
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16: sqrt(abar') x0 + sqrt(1 - abar' - sd^2) e + sd z."""
    table = step_table(STABLE, 20, solver="ddim", eta=0.4, spacing="leading", final="sigma_min")
    a, s, a_next, s_next = ends(table)
    x, clean = noise(20, 5), noise(20, 5, seed=1)
    mean, std = step_gaussian(table, torch.arange(20), x, clean)
    sd = 0.4 * ((1 - a_next**2) / (1 - a**2) * (1 - a**2 / a_next**2)).sqrt()
    direction = (x - a[:, None] * clean) / s[:, None]
    torch.testing.assert_close(std, sd, rtol=1e-9, atol=0)
    expected = a_next[:, None] * clean + (s_next**2 - sd**2).sqrt()[:, None] * direction
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)


def test_stable_diffusion_numbers_of_twenty_ddim_steps():
    """The grid of DDPO, D3PO and SPO: 73 % of the summed KL weight exp(2h) - 1 lies in the step 51 -> 1."""
    table = step_table(STABLE, 20, solver="ddim", eta=1.0, spacing="leading", final="sigma_min")
    assert table.timesteps.tolist() == list(range(951, 0, -50))
    np.testing.assert_allclose(table.std[[0, -2, -1]].numpy(), [0.644, 0.0406, 0.0206], atol=5e-4)
    weight = torch.expm1(2 * table.half_log_snr.diff())
    np.testing.assert_allclose(weight[-3:].numpy(), [1.30, 29.5, 1.0], rtol=1e-2)
    assert bool(table.stochastic.all())


def test_flow_grpo_is_the_small_step_limit():
    """Euler-Maruyama of Liu et al. 2025 (Flow-GRPO, arXiv 2505.05470) with noise level a: eta = a / sqrt(2)."""
    level, t, x, clean = 0.7, 0.6, 0.9, -0.3
    velocity = (x - clean) / t  # the flow prediction e - x0 at x = (1 - t) x0 + t e
    spread = level * math.sqrt(t / (1 - t))
    misses = []
    for dt in (1e-2, 1e-3, 1e-4):
        euler = x - (velocity + spread**2 / (2 * t) * (x + (1 - t) * velocity)) * dt
        s = torch.tensor([t, t - dt], dtype=torch.float64)
        table = solver_table(flow_grid(torch.log1p(-s) - s.log()), order=1, eta=level / math.sqrt(2))
        mean = float(table.cx[0] * x + table.c[0, 0] * clean)
        misses.append((abs(mean - euler) / dt, abs(float(table.std[0]) / (spread * math.sqrt(dt)) - 1)))
    for finer, coarser in itertools.pairwise(reversed(misses)):
        assert coarser[0] / finer[0] == pytest.approx(10, rel=0.2)
        assert coarser[1] / finer[1] == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_kl_of_two_noise_predictions(eta):
    """KL of the step = w |de|^2 / 2, w = (e^h - e^{-eta^2 h})^2 / (1 - e^{-2 eta^2 h}); at eta = 1, SNR'/SNR - 1."""
    table = step_table(STABLE, 10, order=1, eta=eta, final="sigma_min")
    k = 4
    a, s, a_next, s_next = (float(v[k]) for v in ends(table))
    x, e, other = noise(1, 6), noise(1, 6, seed=1), noise(1, 6, seed=2)
    p, q = (torch.distributions.Normal(*step_gaussian(table, k, x, (x - s * guess) / a)) for guess in (e, other))
    h = math.log(a_next / s_next) - math.log(a / s)
    weight = (math.exp(h) - math.exp(-(eta**2) * h)) ** 2 / -math.expm1(-2 * eta**2 * h)
    kl = torch.distributions.kl_divergence(p, q).sum()
    assert float(kl) == pytest.approx(weight * float((e - other).square().sum()) / 2, rel=1e-10)
    if eta == 1.0:
        assert weight == pytest.approx((a_next / s_next) ** 2 / (a / s) ** 2 - 1, rel=1e-10)


# --- identities ------------------------------------------------------------------------------------------------------

GRIDS = {
    "sd trailing zero": (STABLE, 20, "trailing", "zero"),
    "sd karras": (STABLE, 12, "karras", "sigma_min"),
    "sd dense": (STABLE, 333, "linspace", "sigma_min"),
    "flow from pure noise": (FLOW3, 9, "trailing", "zero"),
    "flow sigma_min": (FLOW3, 20, "flow", "sigma_min"),
    "zero snr": (ZERO_SNR, 17, "trailing", "sigma_min"),
    "one step": (STABLE, 1, "trailing", "zero"),
    "one flow step": (FLOW3, 1, "trailing", "zero"),
}


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_signal_and_noise_levels_are_kept(grid, options):
    schedule, n, spacing, final = GRIDS[grid]
    table = step_table(schedule, n, spacing=spacing, final=final, **kind(*options))
    a, s, a_next, s_next = ends(table)
    for field in (table.cx, table.c, table.std):
        assert field.dtype == torch.float64 and bool(field.isfinite().all())
    torch.testing.assert_close(table.cx * a + table.c.sum(1), a_next, rtol=0, atol=5e-13)
    if options[2] > 0 or options[0] == "ddim":
        torch.testing.assert_close((table.cx * s) ** 2 + table.std**2, s_next**2, rtol=0, atol=1e-14)
    else:
        torch.testing.assert_close(table.cx * s, s_next, rtol=0, atol=1e-14)
    assert bool((table.stochastic == (table.std > 0)).all())
    assert bool(table.stochastic[:-1].all()) == (options[2] > 0) or len(table) == 1
    # the history that a row says it needs is the history that it weighs
    used = 1 + (table.c[:, 1] != 0).long() + (table.c[:, 2] != 0).long()
    assert bool((used == table.order).all())


def test_the_end_is_deterministic_and_returns_the_clean_prediction():
    for schedule, spacing in ((STABLE, "linspace"), (FLOW3, "trailing")):
        for options in KINDS:
            table = step_table(schedule, 6, spacing=spacing, **kind(*options))
            assert not bool(table.stochastic[-1])
            assert (float(table.cx[-1]), table.c[-1].tolist(), float(table.std[-1])) == (0.0, [1.0, 0.0, 0.0], 0.0)
            assert int(table.order[-1]) == 1


def test_pure_noise_at_the_start_is_analytic():
    """From sigma = 1: N(alpha' m, sigma'^2) with noise, alpha' m + sigma' x without; the next step has no slope."""
    for schedule in (FLOW3, ZERO_SNR):
        noisy = step_table(schedule, 10, order=2, eta=0.7)
        assert (float(noisy.alpha[0]), float(noisy.sigma[0]), float(noisy.half_log_snr[0])) == (0.0, 1.0, -math.inf)
        assert float(noisy.cx[0]) == 0.0
        assert (float(noisy.c[0, 0]), float(noisy.std[0])) == (float(noisy.alpha[1]), float(noisy.sigma[1]))
        ode = step_table(schedule, 10, order=2, eta=0.0)
        assert (float(ode.c[0, 0]), float(ode.cx[0])) == (float(ode.alpha[1]), float(ode.sigma[1]))
        for table in (noisy, ode):
            assert table.order.tolist() == [1, 1, 2, 2, 2, 2, 2, 2, 2, 1]
            assert float(table.c[1, 1]) == 0.0
        third = step_table(schedule, 20, order=3, eta=0.0)
        assert third.order.tolist() == [1, 1, 2] + [3] * 16 + [1]


@pytest.mark.parametrize(("order", "eta"), [(1, 0.6), (2, 0.6), (2, 0.0), (3, 0.0)])
def test_pure_noise_is_the_limit_of_almost_pure_noise(order, eta):
    levels = torch.tensor([-math.inf, -2.0, -1.2, 0.3, 1.0, 2.5], dtype=torch.float64)
    at = solver_table(flow_grid(levels), order=order, eta=eta)
    near = solver_table(flow_grid(levels.clamp(min=-1e7)), order=order, eta=eta)
    for name in ("cx", "c", "std"):
        torch.testing.assert_close(getattr(near, name), getattr(at, name), rtol=0, atol=1e-6)


def test_first_order_is_ddim_at_both_ends_of_eta_and_between_along_another_dial():
    for schedule in (STABLE, FLOW3):
        for eta in (0.0, 1.0):
            ddim = step_table(schedule, 10, solver="ddim", eta=eta)
            dpm = step_table(schedule, 10, order=1, eta=eta)
            for name in ("cx", "c", "std"):
                torch.testing.assert_close(getattr(ddim, name), getattr(dpm, name), rtol=0, atol=2e-15)
    # t = 700 -> 600 of SD: eta 0.3 is DDIM's 0.352 and 0.7 is its 0.764
    lam = STABLE.half_log_snr(torch.tensor([700, 600]))
    for eta, theirs in ((0.3, 0.352), (0.7, 0.764)):
        ours = solver_table(vp_grid(lam), order=1, eta=eta)
        other = solver_table(vp_grid(lam), solver="ddim", eta=theirs)
        assert float(ours.std[0]) == pytest.approx(float(other.std[0]), rel=2e-3)


@pytest.mark.parametrize("options", [k for k in KINDS if k[2] == 0.0], ids=str)
def test_a_constant_clean_prediction_is_solved_exactly(options):
    x, m = noise(3, 4), noise(3, 4, seed=1)
    for n in (1, 2, 3, 7, 20):
        table = step_table(STABLE, n, final="sigma_min", **kind(*options))
        a, s, a_end, s_end = (float(v) for v in (table.alpha[0], table.sigma[0], table.alpha[-1], table.sigma[-1]))
        landed = walk(table, lambda x, k: m, x)
        torch.testing.assert_close(landed, a_end * m + s_end / s * (x - a * m), rtol=0, atol=1e-12)


def test_orthogonal_maps_commute_with_a_run():
    table = step_table(STABLE, 16, order=3, eta=0.0)
    turn = torch.linalg.qr(noise(4, 4, seed=5))[0]
    x = noise(3, 4)

    def clean(x, k):  # equivariant: depends on direction only through x itself
        return x * torch.tanh(x.norm(dim=1, keepdim=True))

    torch.testing.assert_close(walk(table, clean, x @ turn), walk(table, clean, x) @ turn, rtol=0, atol=1e-12)


# --- orders and ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "order", "final", "expected"),
    [
        (1, 2, "zero", [1]),
        (1, 3, "sigma_min", [1]),
        (2, 2, "zero", [1, 1]),
        (2, 3, "sigma_min", [1, 1]),
        (3, 3, "zero", [1, 2, 1]),
        (3, 2, "sigma_min", [1, 2, 1]),
        (5, 3, "zero", [1, 2, 3, 2, 1]),
        (14, 3, "sigma_min", [1, 2] + [3] * 10 + [2, 1]),
        (15, 3, "sigma_min", [1, 2] + [3] * 13),
        (15, 3, "zero", [1, 2] + [3] * 12 + [1]),
        (20, 2, "zero", [1] + [2] * 18 + [1]),
        (20, 1, "sigma_min", [1] * 20),
    ],
)
def test_order_of_each_step(n, order, final, expected):
    assert step_table(STABLE, n, order=order, eta=0.0, spacing="linspace", final=final).order.tolist() == expected


@pytest.mark.parametrize("spacing", ["karras", "lu", "exponential"])
@pytest.mark.parametrize("n", [2, 3, 10, 20])
def test_a_repeated_end_is_left_out(spacing, n):
    for order, eta, variant in ((2, 1.0, "heun"), (2, 0.0, "midpoint"), (3, 0.0, "midpoint")):
        table = step_table(STABLE, n, order=order, eta=eta, spacing=spacing, final="sigma_min", variant=variant)
        assert len(table) == n - 1
        assert bool((table.half_log_snr.diff() > 1e-3).all())
        assert bool(table.c.isfinite().all()) and bool(table.std.isfinite().all())
        assert float(table.half_log_snr[-1]) == pytest.approx(float(STABLE.half_log_snr(0)), abs=1e-9)
    assert len(step_table(STABLE, n, spacing=spacing, final="zero")) == n


def test_a_repeated_node_inside_is_left_out():
    lam = torch.tensor([-2.0, -1.0, -1.0, 0.5, 1.0], dtype=torch.float64)
    once, twice = (solver_table(vp_grid(v), order=2, eta=1.0) for v in (lam[[0, 1, 3, 4]], lam))
    torch.testing.assert_close(once.c, twice.c, rtol=0, atol=0)
    torch.testing.assert_close(once.half_log_snr, twice.half_log_snr, rtol=0, atol=0)
    assert twice.timesteps.tolist() == once.timesteps.tolist() == [-2.0, -1.0, 0.5]
    lam[2] += 1e-12  # the same level but for rounding: as a step, its 1/h would weigh the history by 1e12
    nearly = solver_table(vp_grid(lam), order=2, eta=1.0)
    assert len(nearly) == 3
    torch.testing.assert_close(nearly.c, once.c, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="no step is left"):
        solver_table(vp_grid(torch.zeros(4, dtype=torch.float64)))
    with pytest.raises(ValueError, match="must rise"):
        solver_table(vp_grid(lam.flip(0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "euler"}, "solver is one of"),
        ({"variant": "ralston"}, "variant is one of"),
        ({"third_order": "half"}, "third_order is one of"),
        ({"order": 4}, "order is 1, 2 or 3"),
        ({"order": 3, "eta": 0.5}, "order 3 has no stochastic form"),
        ({"eta": -0.1}, "eta is a finite number"),
        ({"eta": math.nan}, "eta is a finite number"),
        ({"eta": math.inf}, "eta is a finite number"),
        ({"solver": "ddim", "eta": 1.2}, "DDIM's eta is at most 1"),
        ({"spacing": "quadratic"}, "spacing is one of"),
        ({"final": "tiny"}, "final is one of"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        step_table(STABLE, 10, **options)
    assert "\n" not in str(caught.value)


def test_a_table_on_uniform_lambda_by_hand():
    """h = r = 1 in lambda: the second-order midpoint weights are 3/2 and -1/2 of the first-order one."""
    table = solver_table(vp_grid(torch.arange(-2.0, 3.0, dtype=torch.float64)), order=2, eta=1.0)
    whole = float(table.alpha[2]) * (1 - math.exp(-2.0))
    np.testing.assert_allclose(table.c[1].numpy(), [1.5 * whole, -0.5 * whole, 0.0], rtol=1e-14)
    assert float(table.std[1]) == pytest.approx(float(table.sigma[2]) * math.sqrt(1 - math.exp(-2.0)), rel=1e-14)
    assert len(solver_table(vp_grid(lambda_uniform(7)))) == 7
