"""Shapes checked at run time: each public function of the pure floors, held to a jaxtyping signature over random sizes.

The package itself does not need jaxtyping; its signatures are written out here, and a function that returned [B,1] for
[B], or took unequal batches without a word, would fail.
"""

from __future__ import annotations

import pytest
import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, jaxtyped
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


@checked
def of_steps(name: str, log_ratio_w: Float[Tensor, "T B"], log_ratio_l: Float[Tensor, "T B"]) -> Float[Tensor, "T B"]:
    return getattr(objectives, name)(log_ratio_w, log_ratio_l, beta=0.7, clip=0.1)


@checked
def of_lists(
    scores: Float[Tensor, "B K"], relevance: Float[Tensor, "B K"]
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B K K"]]:
    return objectives.rank_dpo(scores, relevance, 0.7), objectives.gain_weights(relevance)


@checked
def of_groups(
    log_ratio: Float[Tensor, "G K T"], old: Float[Tensor, "G K T"], reward: Float[Tensor, "G K"], clip: float | None
) -> Float[Tensor, "G"]:
    return objectives.prdp(log_ratio, old, reward, 0.7, clip)


@checked
def of_rewards(
    rewards: Float[Tensor, "M G K"],
) -> tuple[Float[Tensor, "G K"], Float[Tensor, "G K"], Int[Tensor, "G"], Int[Tensor, "G"], Bool[Tensor, "G"]]:
    return (
        objectives.win_counts(rewards),
        objectives.group_advantage(rewards[0]),
        *objectives.best_and_worst(rewards[0]),
    )


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
    group, lists = batch + 1, draw(batch, shape[1] + 1)
    for name in ("d3po", "spo"):
        of_steps(name, draw(3, batch), draw(3, batch))
    of_lists(lists, draw(*lists.shape).sigmoid())
    for clip in (None, 0.1):
        of_groups(draw(group, 3, batch), draw(group, 3, batch), draw(group, 3), clip)
    of_rewards(draw(2, group, 3))
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
