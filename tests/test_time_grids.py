"""Time grids against diffusers' schedulers and against numbers written down."""

from __future__ import annotations

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from helpers_samplers import SD15

from diffusion_align.schedule import Schedule
from diffusion_align.time_grids import time_grid
from diffusion_align.vocabulary import SPACINGS

LINEAR = Schedule.from_config({})
STABLE = Schedule.from_config(SD15)
FLOW3 = Schedule.from_config({"use_flow_sigmas": True, "flow_shift": 3.0})
EPSILON = 1e-6  # so that cutting a time that should be an integer does not take one off

# Ten steps on N = 1000 linear betas 1e-4 .. 0.02, as diffusers 0.42 lays them: network times, then sigma / alpha.
TIMES = {
    "linspace": [999, 899, 799, 699, 599, 500, 400, 300, 200, 100],
    "leading": [900, 810, 720, 630, 540, 450, 360, 270, 180, 90],
    "trailing": [999, 899, 799, 699, 599, 499, 399, 299, 199, 99],
    "karras": [999, 937, 864, 775, 663, 511, 301, 102, 18, 0],
    "lu": [999, 886, 757, 603, 410, 202, 73, 22, 5, 0],
    "exponential": [999, 886, 757, 602, 409, 202, 72, 21, 4, 0],
}
NOISE = {
    "linspace": [157.4072, 60.2714, 25.5285, 11.9395, 6.1352, 3.4430, 2.0411, 1.2402, 0.7236, 0.3423],
    "karras": [157.40727, 85.71073, 44.04765, 21.1056, 9.27474, 3.65264, 1.24636, 0.34971, 0.07393, 0.01],
    "lu": [157.407, 53.789, 18.381, 6.281, 2.146, 0.7335, 0.2506, 0.0857, 0.0293, 0.01],
}


def ratio(grid):
    return grid.sigma / grid.alpha


@pytest.mark.parametrize("spacing", TIMES)
def test_ten_steps_are_the_known_ones(spacing):
    grid = time_grid(LINEAR, 10, spacing)
    # diffusers cuts exponential times, and rounds the others
    times = (grid.timesteps + EPSILON).floor() if spacing == "exponential" else grid.timesteps.round()
    assert times.tolist() == TIMES[spacing]
    if spacing in NOISE:
        np.testing.assert_allclose(ratio(grid)[:-1].numpy(), NOISE[spacing], rtol=1e-3, atol=1e-4)
    assert (float(ratio(grid)[-1]), float(grid.alpha[-1]), float(grid.half_log_snr[-1])) == (0.0, 1.0, math.inf)


def test_stable_diffusion_karras_is_the_known_one():
    grid = time_grid(STABLE, 10, "karras", "sigma_min")
    assert grid.timesteps.round().tolist() == [999, 916, 815, 687, 523, 327, 146, 41, 7, 0]
    known = [14.61465, 9.10294, 5.4784, 3.16861, 1.74942, 0.91408, 0.44692, 0.2014, 0.08191, 0.02917, 0.02917]
    np.testing.assert_allclose(ratio(grid).numpy(), known, atol=2e-5)


def test_shifted_flow_is_the_known_one():
    grid = time_grid(FLOW3, 10, "flow")
    assert (grid.timesteps + EPSILON).floor().tolist() == [999, 963, 922, 874, 817, 749, 666, 562, 428, 249]
    known = [0.99967, 0.96394, 0.92272, 0.87464, 0.81781, 0.74962, 0.6663, 0.56215, 0.42827, 0.24979, 0.0]
    np.testing.assert_allclose(grid.sigma.numpy(), known, atol=1e-5)
    np.testing.assert_allclose(grid.timesteps.numpy(), 1000 * grid.sigma[:-1].numpy(), rtol=1e-12)


def test_flow_from_pure_noise_is_symmetric_in_half_log_snr():
    """u = 1 - i/10 and sigma = 3u / (1 + 2u): lambda = log((1 - u) / u) - log 3, so the steps are symmetric."""
    gaps = time_grid(FLOW3, 10, "trailing").half_log_snr.diff()
    assert gaps[0] == math.inf and gaps[-1] == math.inf
    np.testing.assert_allclose(gaps[1:-1].numpy(), [0.81, 0.54, 0.44, 0.41, 0.41, 0.44, 0.54, 0.81], atol=5e-3)
    np.testing.assert_allclose(gaps.numpy(), gaps.flip(0).numpy(), rtol=1e-9)


OPTIONS = {
    "karras": {"use_karras_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "exponential": {"use_exponential_sigmas": True},
}


@pytest.mark.parametrize("spacing", TIMES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 15, 20, 33, 50])
def test_every_count_is_laid_as_diffusers_lays_it(spacing, n):
    options = OPTIONS.get(spacing, {"timestep_spacing": spacing})
    for final in ("zero", "sigma_min"):
        reference = diffusers.DPMSolverMultistepScheduler(**SD15, **options, final_sigmas_type=final)
        reference.set_timesteps(n)
        grid = time_grid(STABLE, n, spacing, final)
        times = (grid.timesteps + EPSILON).floor() if spacing == "exponential" else grid.timesteps.round()
        # a float32 table may move a time that lies on the edge by one
        apart = (times.long() - reference.timesteps).abs()
        assert apart.max() <= (0 if spacing in ("linspace", "leading", "trailing") else 1)
        np.testing.assert_allclose(ratio(grid).numpy(), reference.sigmas.numpy(), rtol=3e-4)


@pytest.mark.parametrize(("spacing", "counts"), [("leading", [1, 2, 7, 20, 30, 50]), ("trailing", [1, 4, 7, 30, 50])])
def test_ddim_times(spacing, counts):
    for n in counts:
        reference = diffusers.DDIMScheduler(**SD15, timestep_spacing=spacing)
        reference.set_timesteps(n)
        assert time_grid(STABLE, n, spacing, drop_last=False).timesteps.tolist() == reference.timesteps.tolist()


def test_flow_match_euler_and_flux_grids():
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = Schedule.from_config(reference.config)
    for n in (1, 4, 28):
        reference.set_timesteps(n)
        grid = time_grid(schedule, n, "linspace")
        np.testing.assert_allclose(grid.sigma.numpy(), reference.sigmas.numpy(), atol=1e-6)
        np.testing.assert_allclose(grid.timesteps.numpy(), reference.timesteps.numpy(), atol=1e-3)
        reference.set_timesteps(sigmas=np.linspace(1.0, 1 / n, n).tolist())  # what the Flux pipelines pass
        ours = time_grid(schedule, n, "trailing").sigma.numpy()
        np.testing.assert_allclose(ours, reference.sigmas.numpy(), atol=1e-6)


def test_sigma_min_of_a_flow_schedule_is_that_of_diffusers():
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = Schedule.from_config(reference.config)
    for spacing in ("linspace", "trailing", "flow"):
        end = float(time_grid(schedule, 10, spacing, "sigma_min").sigma[-1])
        assert end == pytest.approx(reference.sigma_min, abs=1e-7)
        assert end == pytest.approx(3 / 1002, rel=1e-12)  # 3 u / (1 + 2 u) at u = 1/1000


def test_dpm_flow_grids():
    for n in (1, 2, 5, 20):
        reference = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0)
        reference.set_timesteps(n)
        np.testing.assert_allclose(time_grid(FLOW3, n, "flow").sigma.numpy(), reference.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize(("spacing", "key"), [("ays", "StableDiffusion"), ("ays_sdxl", "StableDiffusionXL")])
def test_align_your_steps(spacing, key):
    published = diffusers.schedulers.AysSchedules
    grid = time_grid(STABLE, 10, spacing)
    assert grid.timesteps.tolist() == published[key + "Timesteps"]
    np.testing.assert_allclose(ratio(grid).numpy(), published[key + "Sigmas"], rtol=1e-3, atol=2e-3)
    for n in (1, 3, 7, 20, 40):
        other = time_grid(STABLE, n, spacing, "sigma_min")
        assert len(other.timesteps) == n and (other.half_log_snr.diff() > 0).all() and other.timesteps[0] == 999
    # Twice the steps: every second node is one of the ten, and the one between is their geometric mean.
    double = ratio(time_grid(STABLE, 20, spacing)).numpy()
    np.testing.assert_allclose(double[:20:2], ratio(grid)[:10].numpy(), rtol=1e-9)
    np.testing.assert_allclose(double[1], math.sqrt(double[0] * double[2]), rtol=1e-9)


@pytest.mark.parametrize("spacing", (*SPACINGS, "flow"))
def test_levels_are_those_of_the_times(spacing):
    """What a denoiser reads off the schedule at the time it is told is the level that the state has."""
    schedule = FLOW3 if spacing == "flow" else STABLE
    for n in (1, 2, 13):
        grid = time_grid(schedule, n, spacing)
        assert grid.timesteps.dtype == grid.alpha.dtype == torch.float64
        torch.testing.assert_close(schedule.alpha(grid.timesteps), grid.alpha[:-1], rtol=1e-12, atol=0)
        torch.testing.assert_close(schedule.sigma(grid.timesteps), grid.sigma[:-1], rtol=1e-12, atol=0)


def test_zero_terminal_snr_starts_at_pure_noise_on_every_grid_that_reaches_it():
    schedule = Schedule.from_config({**SD15, "rescale_betas_zero_snr": True})
    for spacing in ("linspace", "trailing", "karras", "lu", "ays"):
        grid = time_grid(schedule, 10, spacing)
        assert (float(grid.alpha[0]), float(grid.sigma[0])) == (0.0, 1.0), spacing
        assert grid.half_log_snr[1] > -math.log(4096) and (grid.half_log_snr.diff() > 0).all()
    reference = diffusers.DPMSolverMultistepScheduler(**SD15, rescale_betas_zero_snr=True, use_karras_sigmas=True)
    reference.set_timesteps(10)
    ours = ratio(time_grid(schedule, 10, "karras"))
    np.testing.assert_allclose(ours[1:].numpy(), reference.sigmas[1:].numpy(), rtol=1e-3)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("spacing", ["karras", "lu", "exponential"])
def test_both_ends_are_nodes_of_the_table_and_not_only_up_to_rounding(spacing, zero_snr):
    """Off by rounding, the start would miss pure noise; with betas this strong the last level is already near it."""
    for last_beta, n in itertools.product((0.008, 0.012, 0.018, 0.02, 0.025), (2, 7, 20)):
        config = {"beta_start": 0.00049, "beta_end": last_beta, "rescale_betas_zero_snr": zero_snr}
        grid = time_grid(Schedule.from_config(config), n, spacing, "sigma_min")
        assert (float(grid.timesteps[0]), float(grid.timesteps[-1])) == (999.0, 0.0)
        assert (float(grid.half_log_snr[0]) == -math.inf) == zero_snr
        assert grid.half_log_snr[-2] == grid.half_log_snr[-1]
        assert (grid.timesteps.diff() < 0).all()


def test_lambda_min_clipped_moves_the_start():
    config = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
    schedule = Schedule.from_config(config)
    for spacing in ("linspace", "leading"):
        reference = diffusers.DPMSolverMultistepScheduler(**config, timestep_spacing=spacing)
        reference.set_timesteps(12)
        assert time_grid(schedule, 12, spacing).timesteps.tolist() == reference.timesteps.tolist()
    start = time_grid(schedule, 12, "trailing").timesteps[0]
    assert schedule.half_log_snr(start) >= -5.1 > schedule.half_log_snr(start + 1)


@pytest.mark.parametrize(
    ("schedule", "steps", "spacing", "final", "message"),
    [
        (LINEAR, 10, "quadratic", "zero", "spacing is one of"),
        (LINEAR, 10, "linspace", "one", "final is one of"),
        (LINEAR, 0, "linspace", "zero", "1 .. 1000"),
        (LINEAR, 1001, "linspace", "zero", "1 .. 1000"),
        (LINEAR, 2.5, "linspace", "zero", "1 .. 1000"),
        (LINEAR, 10, "flow", "zero", "needs a flow schedule"),
        (LINEAR, 1000, "leading", "zero", "do not fit"),
        (FLOW3, 10, "karras", "zero", "a flow schedule has"),
        (Schedule.from_config({"num_train_timesteps": 100}), 10, "ays", "zero", "1000-step"),
    ],
)
def test_grids_that_do_not_exist_are_refused(schedule, steps, spacing, final, message):
    with pytest.raises(ValueError, match=message):
        time_grid(schedule, steps, spacing, final)


def test_an_offset_beyond_the_last_step_is_refused():
    with pytest.raises(ValueError, match="start beyond t = 999"):
        time_grid(Schedule.from_config({"steps_offset": 1}), 1000, "leading", drop_last=False)
