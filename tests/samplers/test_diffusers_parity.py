"""Whole runs against diffusers' schedulers, fed with the same network outputs and the same noise."""

from __future__ import annotations

import itertools

import diffusers
import pytest
import torch
from helpers_samplers import SD15, noise, walk

from diffusion_align.prediction import to_clean
from diffusion_align.samplers import step_table
from diffusion_align.samplers.kernel import step_gaussian
from diffusion_align.samplers.tables import solver_table
from diffusion_align.schedule import Schedule
from diffusion_align.time_grids import time_grid

# Relative to the largest entry. Their alpha_bar is float32, and at the first of 1000 levels 1 - alpha_bar is 8.5e-4:
# half an ulp of 1 (6e-8) is 7e-5 of that variance, 3.5e-5 of its sigma. Every step rounds the state to float32 besides.
TOLERANCE = 1e-4
SHAPE = (2, 3, 4)
COUNTS = (5, 10, 15, 20)
GRIDS = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "exponential": {"use_exponential_sigmas": True},
}
# order and eta; third order has no stochastic form
SOLVERS = [(1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0), (3, 0.0)]


def network(x, t):
    """Any smooth function of state and time; the time is the whole number that diffusers passes on."""
    return torch.tanh(1.3 * x + 0.2 * x.roll(1, -1)) + 0.3 * torch.cos(torch.as_tensor(float(t)) / 150)


def largest_difference(table, schedule, scheduler, seed) -> float:
    """Between the ends of the two runs, relative to the largest entry."""
    start = noise(*SHAPE, seed=seed)
    draws = [noise(*SHAPE, seed=1000 + k) for k in range(len(scheduler.timesteps))]

    def clean(x, k):
        output = network(x, scheduler.timesteps[k])
        return to_clean(output, x, table.alpha[k], table.sigma[k], schedule.prediction_type)

    ours = walk(table, clean, start, draws)
    theirs = start
    for k, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(network(theirs, t), t, theirs, variance_noise=draws[k]).prev_sample
    assert theirs.dtype == torch.float64
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", GRIDS)
def test_multistep_dpm_solver(prediction, spacing):
    for (order, eta), n, final in itertools.product(SOLVERS, COUNTS, ("zero", "sigma_min")):
        repeats = final == "sigma_min" and spacing in ("karras", "lu", "exponential")
        if repeats and order == 3 and n >= 15:
            continue  # their step between two equal levels is nan there; ours is left out
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **SD15,
            **GRIDS[spacing],
            prediction_type=prediction,
            solver_order=order,
            algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
            final_sigmas_type=final,
        )
        schedule = Schedule.from_config(scheduler.config)
        scheduler.set_timesteps(n)
        table = step_table(schedule, n, order=order, eta=eta, spacing=spacing, final=final)
        assert len(table) == n - repeats
        assert largest_difference(table, schedule, scheduler, seed=n) < TOLERANCE, (order, eta, n, final)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_heun_variant(eta):
    for spacing, n in itertools.product(("linspace", "karras"), COUNTS):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **SD15,
            **GRIDS[spacing],
            solver_type="heun",
            algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        )
        schedule = Schedule.from_config(scheduler.config)
        scheduler.set_timesteps(n)
        table = step_table(schedule, n, eta=eta, spacing=spacing, variant="heun")
        assert largest_difference(table, schedule, scheduler, seed=n) < TOLERANCE, (spacing, n)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("order", "eta"), SOLVERS)
def test_flow_prediction(order, eta, shift):
    for n in COUNTS:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True,
            flow_shift=shift,
            prediction_type="flow_prediction",
            solver_order=order,
            algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        )
        schedule = Schedule.from_config(scheduler.config)
        scheduler.set_timesteps(n)
        table = step_table(schedule, n, order=order, eta=eta, spacing="flow")
        assert largest_difference(table, schedule, scheduler, seed=n) < TOLERANCE, n


def test_linear_betas():
    """The first noise level of DDPM's betas is 157 times the signal: hardest for float32."""
    for (order, eta), prediction in itertools.product(SOLVERS, ("epsilon", "v_prediction")):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            solver_order=order, prediction_type=prediction, algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++"
        )
        schedule = Schedule.from_config(scheduler.config)
        scheduler.set_timesteps(20)
        table = step_table(schedule, 20, order=order, eta=eta, spacing="linspace")
        assert largest_difference(table, schedule, scheduler, seed=0) < TOLERANCE, (order, eta, prediction)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("spacing", "counts"), [("leading", (1, 5, 7, 20, 30)), ("trailing", (1, 5, 10, 20))])
def test_ddim(spacing, counts, eta):
    """On trailing grids only for n that divide 1000: elsewhere it steps to a level that is not the next node."""
    for n, to_one, prediction in itertools.product(counts, (True, False), ("epsilon", "sample", "v_prediction")):
        scheduler = diffusers.DDIMScheduler(
            **SD15, timestep_spacing=spacing, set_alpha_to_one=to_one, clip_sample=False, prediction_type=prediction
        )
        schedule = Schedule.from_config(scheduler.config)
        final = "zero" if to_one else "sigma_min"
        table = step_table(schedule, n, solver="ddim", eta=eta, spacing=spacing, final=final)
        scheduler.set_timesteps(n)
        start, draws = noise(*SHAPE, seed=n), [noise(*SHAPE, seed=1000 + k) for k in range(n)]

        def clean(x, k, table=table, schedule=schedule):
            output = network(x, table.timesteps[k])
            return to_clean(output, x, table.alpha[k], table.sigma[k], schedule.prediction_type)

        ours, theirs = walk(table, clean, start, draws), start
        for k, t in enumerate(scheduler.timesteps):
            theirs = scheduler.step(network(theirs, t), t, theirs, eta=eta, variance_noise=draws[k] if eta else None)[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))


@pytest.mark.parametrize(("count", "deviations"), [(20, [0.0406, 0.0206]), (50, [0.0206])])
def test_the_published_ddim_of_stable_diffusion_has_noise_in_every_step(count, deviations):
    """D3PO, SPO and DDPO train every step of it. Mean and deviation of each, the last from t = 1 to the level of t = 0
    included, are those of diffusers' scheduler, whose step is here given its constants in float64."""
    scheduler = diffusers.DDIMScheduler(**SD15, set_alpha_to_one=False, clip_sample=False)
    assert scheduler.config.timestep_spacing == "leading"
    schedule = Schedule.from_config(scheduler.config)
    betas = torch.linspace(SD15["beta_start"] ** 0.5, SD15["beta_end"] ** 0.5, 1000, dtype=torch.float64).square()
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(count)
    table = step_table(schedule, count, solver="ddim", eta=1.0, spacing="leading", final="sigma_min")
    assert table.timesteps.tolist() == scheduler.timesteps.tolist() and bool(table.stochastic.all())
    assert len(table) == count and int(table.timesteps[-1]) == 1
    for k, t in enumerate(scheduler.timesteps):
        x, output = noise(*SHAPE, seed=k), noise(*SHAPE, seed=100 + k)
        clean = to_clean(output, x, table.alpha[k], table.sigma[k], "epsilon")
        mean, std = step_gaussian(table, k, x, clean)
        quiet, loud = (
            scheduler.step(output, t, x, eta=1.0, variance_noise=z).prev_sample
            for z in (torch.zeros_like(x), torch.ones_like(x))
        )
        # 1 - abar at t = 1 is 1.7e-3, where float64's 1.1e-16 is 7e-14, and the deviation takes a difference of two.
        torch.testing.assert_close(mean, quiet, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(std.expand(x.shape[0]), (loud - quiet).mean((1, 2)), rtol=1e-9, atol=1e-9)
    assert [round(float(s), 4) for s in table.std[-len(deviations) :]] == deviations  # to t = 1 and from there
    assert not bool(step_table(schedule, count, solver="ddim", spacing="leading").stochastic[-1])


@pytest.mark.parametrize("order", [2, 3])
def test_the_predictor_of_unipc_is_the_same_step(order):
    """UniPC's predictor (Zhao et al. 2023, arXiv 2302.04867, B(h) = e^h - 1): midpoint second, exact third order."""
    for n in (16, 24):
        scheduler = diffusers.UniPCMultistepScheduler(
            **SD15,
            solver_order=order,
            solver_type="bh2",
            disable_corrector=list(range(n)),
            lower_order_final=False,
            timestep_spacing="linspace",
            final_sigmas_type="sigma_min",
        )
        schedule = Schedule.from_config(scheduler.config)
        scheduler.set_timesteps(n)
        grid = time_grid(schedule, n, "linspace", "sigma_min")
        assert grid.timesteps.tolist() == scheduler.timesteps.tolist()
        start, ends = noise(*SHAPE, seed=n), {}
        for third in ("exact", "published"):
            table = solver_table(grid, order=order, eta=0.0, third_order=third)

            def clean(x, k, table=table):
                return to_clean(network(x, table.timesteps[k]), x, table.alpha[k], table.sigma[k], "epsilon")

            ends[third] = walk(table, clean, start)
        theirs = start
        for t in scheduler.timesteps:
            theirs = scheduler.step(network(theirs, t), t, theirs).prev_sample
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ends["exact"], theirs, rtol=0, atol=TOLERANCE * scale)
        assert (float((ends["published"] - theirs).abs().max()) > 10 * TOLERANCE * scale) == (order == 3)
