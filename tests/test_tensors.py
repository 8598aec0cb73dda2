import pytest
import torch

from diffusion_align.tensors import expand_to, require_same_shape, sum_dims, widen


def test_expand_to_scales_each_sample_by_its_own_number():
    x = torch.ones(3, 2, 2)
    assert (expand_to(torch.tensor([1.0, 2.0, 3.0]), x) * x)[:, 1, 1].tolist() == [1, 2, 3]
    assert expand_to(torch.ones(3), x).shape == (3, 1, 1)
    assert expand_to(torch.ones(3), torch.ones(3)).shape == (3,)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 1), (1, 3)])
def test_expand_to_refuses_what_would_broadcast(shape):
    with pytest.raises(ValueError, match=r"\[B\]"):
        expand_to(torch.ones(shape), torch.ones(3, 3))


def test_sum_dims_sums_and_does_not_average():
    """Each sample of [2,3,4] holds 12 times its number: 12 and 24."""
    x = torch.stack([torch.ones(3, 4), 2 * torch.ones(3, 4)])
    assert sum_dims(x).tolist() == [12, 24]
    assert sum_dims(torch.tensor([5.0, 7.0])).tolist() == [5, 7]
    assert sum_dims(torch.ones(0, 4)).shape == (0,)
    with pytest.raises(ValueError, match="batch"):
        sum_dims(torch.tensor(1.0))


def test_sum_dims_accumulates_half_precision_in_float32():
    """In bfloat16 a running sum of ones stops at 256, where 1 is below half a unit in the last place."""
    assert sum_dims(torch.ones(1, 16384, dtype=torch.bfloat16)).item() == 16384
    assert sum_dims(torch.ones(1, 4, dtype=torch.float16)).dtype == torch.float32
    assert sum_dims(torch.ones(1, 4, dtype=torch.float64)).dtype == torch.float64


def test_widen():
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [widen(torch.ones(1, dtype=kind)).dtype for kind in kinds] == [torch.float32] * 3 + [torch.float64]
    x = torch.ones(2)
    assert widen(x) is x


def test_require_same_shape_names_both():
    require_same_shape(a=torch.ones(2, 3), b=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"winner is \[4\] but loser is \[4, 1\]"):
        require_same_shape(winner=torch.ones(4), loser=torch.ones(4, 1))
    with pytest.raises(ValueError, match="third"):
        require_same_shape(first=torch.ones(1), second=torch.ones(1), third=torch.ones(2))
