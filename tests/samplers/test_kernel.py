"""The one step: hand arithmetic on a made-up table, mixed batches, missing history, precision."""

from __future__ import annotations

import pytest
import torch
from helpers_samplers import SD15, noise, walk

from diffusion_align.samplers import StepTable, step_gaussian, step_table
from diffusion_align.schedule import Schedule

STABLE = Schedule.from_config(SD15)


def made_up() -> StepTable:
    def row(*values):
        return torch.tensor(values, dtype=torch.float64)

    return StepTable(
        timesteps=row(900, 500, 100),
        cx=row(0.5, 2.0, 1.0),
        c=torch.tensor([[1.0, 0.0, 0.0], [3.0, -1.0, 0.0], [4.0, -2.0, 0.5]], dtype=torch.float64),
        std=row(0.3, 0.2, 0.0),
        order=torch.tensor([1, 2, 3]),
        stochastic=torch.tensor([True, True, False]),
        alpha=row(0.1, 0.4, 0.8, 1.0),
        sigma=row(0.9, 0.7, 0.4, 0.0),
        half_log_snr=row(-2, 0, 1, float("inf")),
    )


def test_mean_and_std_by_hand():
    x, clean, previous, before = (torch.full((2, 1), v, dtype=torch.float64) for v in (10.0, 1.0, 2.0, 4.0))
    for k, mean, std in ((0, 0.5 * 10 + 1, 0.3), (1, 2 * 10 + 3 - 2, 0.2), (2, 10 + 4 - 4 + 2, 0.0)):
        got = step_gaussian(made_up(), k, x, clean, previous, before)
        assert got[0].tolist() == [[mean], [mean]]
        assert got[1].tolist() == [std, std]


def test_a_batch_may_mix_steps_in_any_order():
    table = step_table(STABLE, 12, order=3, eta=0.0)
    x, clean, previous, before = (noise(12, 2, 3, seed=seed) for seed in range(4))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mean, std = step_gaussian(table, order, x, clean, previous, before)
    for row, k in enumerate(order.tolist()):
        one = [v[row : row + 1] for v in (x, clean, previous, before)]
        alone, alone_std = step_gaussian(table, k, *one)
        torch.testing.assert_close(mean[row], alone[0], rtol=0, atol=0)
        assert float(std[row]) == float(alone_std[0])


def test_shuffled_steps_of_a_run_equal_the_run():
    """Scoring items of a run out of order gives the means that the run had."""
    table = step_table(STABLE, 10, order=2, eta=1.0)
    states, predictions, means = [noise(1, 3)], [], []
    for k in range(10):
        predictions.append(torch.tanh(states[-1]) * 0.8)
        mean, std = step_gaussian(table, k, states[-1], predictions[-1], *predictions[-2:-1])
        means.append(mean)
        states.append(mean + std * noise(1, 3, seed=k + 1))
    k = torch.tensor([7, 0, 3, 9, 1, 8, 2, 6, 5, 4])
    previous = torch.cat([torch.zeros(1, 3, dtype=torch.float64), *predictions[:-1]])
    mean, _ = step_gaussian(table, k, torch.cat(states[:-1])[k], torch.cat(predictions)[k], previous[k])
    torch.testing.assert_close(mean, torch.cat(means)[k], rtol=0, atol=0)


def test_a_lone_higher_order_step_is_refused():
    x = noise(2, 3)
    with pytest.raises(ValueError, match=r"step 1 is of order 2 .* replay .* order=1"):
        step_gaussian(made_up(), 1, x, x)
    with pytest.raises(ValueError, match="step 2 is of order 3"):
        step_gaussian(made_up(), torch.tensor([0, 2]), x, x, x)
    with pytest.raises(ValueError, match="step 2 is of order 3"):
        step_gaussian(made_up(), 2, x, x, None, x)
    step_gaussian(made_up(), 0, x, x)
    nothing_like_it = noise(5, 5)  # history that no sample of the batch uses is not even looked at
    step_gaussian(made_up(), 0, x, x, nothing_like_it)


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_single_and_double_stays(given):
    inside = torch.float64 if given == torch.float64 else torch.float32
    table = step_table(STABLE, 10, order=2)
    x, clean, previous = (noise(2, 8, seed=seed).to(given) for seed in range(3))
    mean, std = step_gaussian(table, 4, x, clean, previous)
    assert mean.dtype == std.dtype == inside
    exact, exact_std = step_gaussian(table, 4, x.double(), clean.double(), previous.double())
    torch.testing.assert_close(mean.double(), exact, rtol=0, atol=1e-6 if inside == torch.float32 else 0)
    torch.testing.assert_close(std.double(), exact_std, rtol=1e-6, atol=0)


def test_gradients_reach_the_state_and_all_the_history_used():
    k, inputs = torch.tensor([2, 1]), [noise(2, 3, seed=seed).requires_grad_() for seed in range(4)]
    mean, _ = step_gaussian(made_up(), k, *inputs)
    grads = torch.autograd.grad(mean.sum(), inputs)
    # rows are step 2 and step 1 of the made-up table: cx, c0, c1, c2
    expected = [[1.0, 2.0], [4.0, 3.0], [-2.0, -1.0], [0.5, 0.0]]
    assert [g[:, 0].tolist() for g in grads] == expected


def test_batch_mates_do_not_matter():
    table = step_table(STABLE, 8, order=2, eta=0.0)

    def clean(x, k):
        return torch.sin(x) / (k + 1)

    x = noise(5, 4)
    torch.testing.assert_close(walk(table, clean, x)[2:3], walk(table, clean, x[2:3]), rtol=0, atol=0)


def test_gather_follows_dtype_and_shape():
    table = made_up()
    x = noise(2, 3)
    assert table.gather("c", torch.tensor([2, 0]), x).tolist() == [[4.0, -2.0, 0.5], [1.0, 0.0, 0.0]]
    assert table.gather("cx", 1, x.half()).dtype == torch.float32
    assert table.gather("cx", 1, x).dtype == torch.float64
    assert table.gather("order", 1, x.half()).tolist() == [2, 2]
    assert table.gather("stochastic", torch.tensor([0, 2]), x).tolist() == [True, False]
    assert len(table) == 3


def test_wrong_indices_and_shapes_are_refused():
    table, x = made_up(), noise(2, 3)
    for k in (3, -1, torch.tensor([0, 3])):
        with pytest.raises(IndexError, match="outside 0 .. 2"):
            step_gaussian(table, k, x, x)
    for k in (torch.tensor([0, 1, 2]), torch.tensor([[0, 1]]), torch.tensor([0.0, 1.0]), 1.0, True):
        with pytest.raises(ValueError, match="one per sample"):
            step_gaussian(table, k, x, x)
    with pytest.raises(ValueError, match="clean"):
        step_gaussian(table, 0, x, noise(2, 1))
    with pytest.raises(ValueError, match="previous"):
        step_gaussian(table, 1, x, x, noise(1, 3))
