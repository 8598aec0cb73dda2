"""Shapes checked at run time: each public function of the pure floors, held to a jaxtyping signature over random sizes.

The package itself does not need jaxtyping; its signatures are written out here, and a function that returned [B,1] for
[B], or took unequal batches without a word, would fail.
"""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor

from diffusion_align import objectives, prediction, tensors
from diffusion_align.gaussian import Gaussian
from diffusion_align.models.analytic import gaussian_clean
from diffusion_align.rng import generator
from diffusion_align.samplers import replay, rollout, sample, step_gaussian, step_table
from diffusion_align.schedule import Schedule

checked = jaxtyped(typechecker=beartype)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@checked
def margin(
    err_w: Float[Tensor, "B"], err_l: Float[Tensor, "B"], ref_w: Float[Tensor, "B"], ref_l: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    return objectives.diffusion_dpo_margin(err_w, err_l, ref_w, ref_l)


@checked
def link(name: str, value: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    extra = {"robust": {"flip": 0.1}}.get(name, {})
    return getattr(objectives, name)(value, beta=0.7, **extra)


@checked
def clean_of(
    kind: str, x: Float[Tensor, "B *d"], output: Float[Tensor, "B *d"], level: Float[Tensor, "B"]
) -> Float[Tensor, "B *d"]:
    return prediction.to_clean(output, x, level, (1 - level**2).sqrt(), kind)


@checked
def densities(
    mean: Float[Tensor, "B *d"], other: Float[Tensor, "B *d"], x: Float[Tensor, "B *d"], std: Float[Tensor, "B"]
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"], Float[Tensor, "B"]]:
    p, q = Gaussian(mean, std), Gaussian(other, std)
    return p.log_prob(x), p.log_ratio(q, x), p.kl(q)


@checked
def one_step(
    x: Float[Tensor, "B *d"], clean: Float[Tensor, "B *d"], previous: Float[Tensor, "B *d"]
) -> tuple[Float[Tensor, "B *d"], Float[Tensor, "B"]]:
    table = step_table(Schedule.from_config(SD), 10)
    return step_gaussian(table, torch.arange(x.shape[0]) % 9, x, clean, previous)


def sizes(seed):
    rng = generator(seed, "sizes")
    return [int(n) for n in torch.randint(1, 6, (int(torch.randint(2, 5, (), generator=rng)),), generator=rng)]


@pytest.mark.parametrize("seed", range(12))
def test_shapes_in_and_out(seed):
    shape, rng = sizes(seed), generator(seed, "values")
    batch = shape[0]

    def draw(*size):
        return torch.randn(size, generator=rng, dtype=torch.float64)

    margin(*(draw(batch) for _ in range(4)))
    for name in ("logistic", "robust", "hinge", "ipo"):
        link(name, draw(batch))
    level = torch.rand(batch, generator=rng, dtype=torch.float64) * 0.9 + 0.05
    for kind in prediction.KINDS:
        clean_of(kind, draw(*shape), draw(*shape), level)
    densities(draw(*shape), draw(*shape), draw(*shape), level)
    one_step(draw(*shape), draw(*shape), draw(*shape))
    assert tensors.sum_dims(draw(*shape)).shape == (batch,)


@pytest.mark.parametrize("seed", range(4))
def test_shapes_of_a_run(seed):
    shape, schedule = sizes(seed), Schedule.from_config(SD)
    table = step_table(schedule, 6)
    x = torch.randn(shape, generator=generator(seed, "start"), dtype=torch.float64)

    def denoiser(x, t):
        a, s = (tensors.expand_to(level, x) for level in (schedule.alpha(t), schedule.sigma(t)))
        return gaussian_clean(x, a, s, torch.tensor(0.3), torch.tensor(0.5))

    @checked
    def walk(
        x: Float[Tensor, "B *d"],
    ) -> tuple[Float[Tensor, "7 B *d"], Float[Tensor, "6 B"], Float[Tensor, "6 B"], Float[Tensor, "B *d"]]:
        run = rollout(denoiser, table, x, generator(seed, "walk"))
        return run.states, run.log_prob, replay(denoiser, run), sample(denoiser, table, x, generator(seed, "walk"))

    walk(x)
