"""Noise schedules against diffusers, closed forms and hand arithmetic."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch

from diffusion_align.schedule import Schedule, rescale_to_zero_terminal_snr, shift_sigma

CONFIGS = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": np.linspace(0.001, 0.3, 40).tolist(), "num_train_timesteps": 40},
    "short": {"num_train_timesteps": 50, "beta_end": 0.2},
    "zero_snr_linear": {"rescale_betas_zero_snr": True},
}
CONFIGS["zero_snr"] = {**CONFIGS["scaled_linear"], "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("name", CONFIGS)
def test_levels_are_those_of_diffusers(name):
    reference = diffusers.DDIMScheduler(**CONFIGS[name])
    schedule = Schedule.from_config(reference.config)
    t = torch.arange(schedule.num_timesteps)
    signal = reference.alphas_cumprod.double()
    assert len(t) == len(signal)
    # Theirs is a float32 product of 1000 factors, each off by half an ulp (6e-8): 6e-5 if all err to one side, near
    # 2e-6 as they come. 1 - alpha^2 has lost digits near t = 0: hence the absolute tolerance on the square.
    torch.testing.assert_close(schedule.alpha(t), signal.sqrt(), rtol=6e-5, atol=1e-5)
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 - signal, rtol=0, atol=1e-5)
    assert schedule.alpha(t).dtype == torch.float64


@pytest.mark.parametrize("name", CONFIGS)
def test_vp_levels_keep_the_variance_and_their_own_log_ratio(name):
    schedule = Schedule.from_config(CONFIGS[name])
    t = torch.linspace(0, schedule.num_timesteps - 2, 117, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-14)
    torch.testing.assert_close(schedule.half_log_snr(t), torch.log(alpha / sigma), rtol=0, atol=1e-12)
    assert (schedule.half_log_snr(t).diff() < 0).all()


def test_first_levels_by_hand():
    schedule = Schedule.from_config({"num_train_timesteps": 3, "beta_start": 0.1, "beta_end": 0.3})
    alpha = schedule.alpha(torch.tensor([0, 1, 2]))  # betas .1 .2 .3: alpha^2 = .9, .9 * .8, .9 * .8 * .7
    torch.testing.assert_close(alpha**2, torch.tensor([0.9, 0.72, 0.504], dtype=torch.float64), rtol=1e-14, atol=0)
    assert float(schedule.half_log_snr(1)) == pytest.approx(0.5 * math.log(0.72 / 0.28), abs=1e-14)


def test_stable_diffusion_noise_range():
    schedule = Schedule.from_config(CONFIGS["scaled_linear"])
    ratio = torch.exp(-schedule.half_log_snr(torch.tensor([0, 999])))
    assert float(ratio[0]) == pytest.approx(math.sqrt(0.00085 / 0.99915), rel=1e-13)
    assert float(ratio[1]) == pytest.approx(14.6146, abs=1e-4)  # the sigma_max of k-diffusion's wrappers


def test_cosine_follows_its_closed_form():
    """Below the cap of 0.999, alpha^2 telescopes to f((t+1)/N) / f(0), f(u) = cos^2((u + .008) / 1.008 * pi / 2)."""
    schedule = Schedule.from_config(CONFIGS["cosine"])
    for t in (0, 250, 500, 900):
        f = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in ((t + 1) / 1000, 0.0)]
        assert float(schedule.alpha(t)) ** 2 == pytest.approx(f[0] / f[1], rel=1e-12)


def test_zero_terminal_snr_is_exact_and_keeps_the_start():
    betas = torch.linspace(0.01, 0.2, 30, dtype=torch.float64)
    rescaled = rescale_to_zero_terminal_snr(betas)
    assert float(rescaled[0]) == pytest.approx(0.01, abs=1e-15)
    assert float(rescaled[-1]) == 1.0
    schedule = Schedule.from_config(CONFIGS["zero_snr"])
    assert float(schedule.alpha(999)) == 0.0
    assert float(schedule.sigma(999)) == 1.0
    assert float(schedule.half_log_snr(999)) == -math.inf
    assert float(schedule.half_log_snr(998)) > -10
    assert float(schedule.alpha(0)) == pytest.approx(math.sqrt(0.99915), abs=1e-14)


def test_between_integers_the_clock_is_linear_and_invertible():
    schedule = Schedule.from_config(CONFIGS["scaled_linear"])
    ends = schedule.half_log_snr(torch.tensor([17, 18]))
    assert float(schedule.half_log_snr(17.25)) == pytest.approx(float(0.75 * ends[0] + 0.25 * ends[1]), abs=1e-14)
    t = torch.tensor([[0.0, 0.3, 17.25], [500.0, 998.999, 999.0]], dtype=torch.float64)
    torch.testing.assert_close(schedule.timestep_at(schedule.half_log_snr(t)), t, rtol=0, atol=1e-9)
    for config in CONFIGS.values():
        schedule = Schedule.from_config(config)
        t = torch.linspace(0, schedule.num_timesteps - 2, 301, dtype=torch.float64)
        torch.testing.assert_close(schedule.timestep_at(schedule.half_log_snr(t)), t, rtol=0, atol=1e-8)
        assert (schedule.table.diff() < 0).all()
    schedule = Schedule.from_config(CONFIGS["scaled_linear"])
    beyond = schedule.timestep_at(torch.tensor([9.0, -9.0, math.inf, -math.inf]))
    assert beyond.tolist() == [0.0, 999.0, 0.0, 999.0]


def test_inverse_is_that_of_diffusers():
    reference = diffusers.DPMSolverMultistepScheduler()
    schedule = Schedule.from_config(reference.config)
    sigmas = np.array([150.0, 60.0, 7.3, 0.9, 0.05])
    table = (((1 - reference.alphas_cumprod) / reference.alphas_cumprod) ** 0.5).numpy()
    theirs = reference._sigma_to_t(sigmas, np.log(table))
    ours = schedule.timestep_at(-torch.from_numpy(np.log(sigmas)))
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-3)


def test_flow_by_hand():
    schedule = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert (schedule.kind, schedule.shift, schedule.prediction_type) == ("flow", 3.0, "flow_prediction")
    t = torch.tensor([0.0, 250.0, 500.0, 1000.0])
    torch.testing.assert_close(schedule.sigma(t), torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(schedule.alpha(t), torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64))
    lam = schedule.half_log_snr(t)
    assert lam.tolist() == [math.inf, pytest.approx(math.log(3)), 0.0, -math.inf]
    torch.testing.assert_close(schedule.timestep_at(lam), t.double())


def test_flow_shift_is_that_of_diffusers_and_keeps_the_ends():
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    even = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(shift_sigma(even, 3.0), reference.sigmas.double(), rtol=0, atol=1e-6)
    for shift in (1.15, 0.3, math.pi):
        assert shift_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64), shift).tolist() == [0.0, 1.0]


def test_flow_is_known_from_a_saved_config_and_from_one_in_memory():
    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler):
        reference = scheduler(shift=3.0)
        assert "_class_name" not in reference.config
        for config in (reference.config, {**reference.config, "_class_name": type(reference).__name__}):
            assert (Schedule.from_config(config).kind, Schedule.from_config(config).shift) == ("flow", 3.0)


def test_flow_shift_comes_from_the_config_or_from_the_caller():
    assert Schedule.from_config({"use_flow_sigmas": True, "flow_shift": 2.5}).shift == 2.5
    assert Schedule.from_config({"use_flow_sigmas": True, "prediction_type": "epsilon"}).prediction_type == "epsilon"
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
    assert Schedule.from_config(dynamic, shift=math.exp(0.8)).shift == pytest.approx(2.2255, abs=1e-4)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        Schedule.from_config(dynamic)


def test_any_stable_diffusion_scheduler_config_is_read():
    for name in ("PNDMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "LCMScheduler"):
        config = getattr(diffusers, name)(**CONFIGS["scaled_linear"], prediction_type="v_prediction").config
        schedule = Schedule.from_config(config)
        assert schedule.prediction_type == "v_prediction"
        assert float(schedule.half_log_snr(999)) == pytest.approx(-math.log(14.6146), abs=1e-5)


def test_times_keep_shape_and_take_integers_and_floats():
    schedule = Schedule.from_config({})
    t = torch.tensor([[0, 1], [998, 999]], dtype=torch.int32)
    assert schedule.sigma(t).shape == (2, 2)
    assert schedule.sigma(7).shape == ()
    torch.testing.assert_close(schedule.sigma(t), schedule.sigma(t.float()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is one of"),
        ({"prediction_type": "score"}, "prediction_type is one of"),
        ({"trained_betas": [0.1, 1.2, 0.3]}, "betas must be"),
        ({"trained_betas": [0.1]}, "betas must be"),
        ({"trained_betas": [0.1, float("nan")]}, "betas must be"),
        ({"sigma_data": 0.5, "_class_name": "EDMEulerScheduler"}, "EDM"),
        ({"sigma_max": 1348.0, "_class_name": "ScoreSdeVeScheduler"}, "variance-exploding"),
        ({"use_flow_sigmas": True, "flow_shift": 0.0}, "positive number"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1}, "shift_terminal"),
    ],
)
def test_unreadable_configs_are_refused_in_one_line(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        Schedule.from_config(config)
    assert "\n" not in str(caught.value)


def test_shift_of_a_vp_schedule_and_times_outside_are_refused():
    with pytest.raises(ValueError, match="flow"):
        Schedule.from_config({}, shift=3.0)
    schedule = Schedule.from_config({})
    for t in (-1, 1000, 999.5, float("nan")):
        with pytest.raises(ValueError, match="outside 0 .. 999"):
            schedule.alpha(t)
    with pytest.raises(ValueError, match="outside 0 .. 1000"):
        Schedule.from_config({"use_flow_sigmas": True}).alpha(torch.tensor([1000.5]))
