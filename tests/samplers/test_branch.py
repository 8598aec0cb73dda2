import math

import pytest
import torch
from helpers_samplers import SD15, noise

from diffusion_align.models.analytic import ToyDenoiser
from diffusion_align.rng import generator
from diffusion_align.samplers import branch, rollout, step_table
from diffusion_align.samplers.kernel import step_gaussian
from diffusion_align.schedule import Schedule

TABLE = step_table(Schedule.from_config(SD15), 6)
DENOISE = ToyDenoiser(6, torch.Generator().manual_seed(0)).double()


def sources(*ids):
    return [generator(0, "branch", i) for i in ids]


def run():
    return rollout(DENOISE, TABLE, noise(3, 2, 3), generator(0, "run"))


def test_children_come_from_their_parents_gaussian():
    """20 000 children of each of three parents at step 2: mean and std of the kernel, within 5 standard errors."""
    past, count = run(), 20_000
    assert past.clean is not None
    result = branch(DENOISE, TABLE, 2, past.states[2], count, generator(0, "branch"), previous=past.clean[1])
    mean, std = step_gaussian(TABLE, 2, past.states[2], past.clean[2], past.clean[1])
    assert result.children.shape == (count, 3, 2, 3)
    assert torch.equal(result.step.mean, mean) and torch.equal(result.step.std, std)
    assert torch.equal(result.clean, past.clean[2])
    assert ((result.children.mean(0) - mean).abs() < 5 * std[0] / math.sqrt(count)).all()
    assert ((result.children.std(0) - std[0]).abs() < 5 * std[0] / math.sqrt(2 * count)).all()
    assert not result.children.requires_grad and not result.clean.requires_grad


def test_one_child_is_the_next_state_of_a_run():
    past = run()
    source = generator(0, "run")
    x, previous = past.states[0], None
    for k in range(len(TABLE) - 1):
        result = branch(DENOISE, TABLE, k, x, 1, source, previous)
        x, previous = result.children[0], result.clean
        assert torch.equal(x, past.states[k + 1])
        assert torch.allclose(result.step.log_prob(x), past.log_prob[k], atol=1e-12)


def test_children_depend_neither_on_their_number_nor_on_batch_mates():
    x = noise(3, 2, 3)
    four = branch(DENOISE, TABLE, 0, x, 4, sources(0, 1, 2)).children
    two = branch(DENOISE, TABLE, 0, x, 2, sources(0, 1, 2)).children
    assert torch.equal(four[:2], two)
    alone = branch(DENOISE, TABLE, 0, x[[2]], 4, sources(2)).children
    assert torch.allclose(alone[:, 0], four[:, 2], atol=1e-12)
    assert not torch.equal(four[0], four[1])


def test_children_are_stored_in_the_parents_precision():
    half = branch(DENOISE.float(), TABLE, 0, noise(3, 6, dtype=torch.bfloat16), 2, generator(0, "branch"))
    DENOISE.double()
    assert half.children.dtype == torch.bfloat16 and half.clean.dtype == half.step.mean.dtype == torch.float32


def test_refusals():
    x = noise(3, 2, 3)
    with pytest.raises(ValueError, match="step 5 has no noise"):
        branch(DENOISE, TABLE, 5, x, 2, generator(0, "branch"))
    with pytest.raises(ValueError, match="at least one child"):
        branch(DENOISE, TABLE, 0, x, 0, generator(0, "branch"))
    with pytest.raises(ValueError, match="previous"):
        branch(DENOISE, TABLE, 2, x, 2, generator(0, "branch"))
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        branch(DENOISE, TABLE, 0, x, 2, sources(0, 1))
