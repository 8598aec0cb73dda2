"""Learning rates against transformers' schedules, the average against its definition."""

import importlib

import pytest
import torch
from torch.nn import Parameter

from diffusion_align.train.ema import start_ema
from diffusion_align.train.optimizer import adamw, lr_schedule
from diffusion_align.vocabulary import LR_SCHEDULES


def rates(optimizer, schedule, count):
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_rates_are_those_of_transformers(name, warmup):
    from transformers import optimization as theirs

    make = {
        "constant": lambda o: theirs.get_constant_schedule_with_warmup(o, warmup),
        "linear": lambda o: theirs.get_linear_schedule_with_warmup(o, warmup, 30),
        "cosine": lambda o: theirs.get_cosine_schedule_with_warmup(o, warmup, 30),
        "cosine_with_restarts": lambda o: theirs.get_cosine_with_hard_restarts_schedule_with_warmup(o, warmup, 30, 3),
        "polynomial": lambda o: theirs.get_polynomial_decay_schedule_with_warmup(o, warmup, 30, lr_end=0, power=2),
    }[name]
    other = adamw([Parameter(torch.zeros(1))], 0.3)
    expected = rates(other, make(other), 35)
    if name == "cosine":
        expected[31:] = [0.0] * 4  # theirs rises again after the end, where ours stays at 0
    mine = adamw([Parameter(torch.zeros(1))], 0.3)
    schedule = lr_schedule(mine, name, warmup=warmup, total=30, cycles=3, power=2.0)
    assert rates(mine, schedule, 35) == pytest.approx(expected, abs=1e-12)


def test_wrong_schedules_are_refused():
    optimizer = adamw([Parameter(torch.zeros(1))], 1e-3)
    with pytest.raises(ValueError, match="unknown learning-rate schedule 'cosin': expected one of constant, linear"):
        lr_schedule(optimizer, "cosin", total=10)
    with pytest.raises(ValueError, match="total 0"):
        lr_schedule(optimizer, "linear", total=0)


def test_eight_bit_without_bitsandbytes_names_the_cure(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"pip install 'diffusion_align\[8bit\]'"):
        adamw([Parameter(torch.zeros(1))], 1e-3, eight_bit=True)


def test_the_average_is_its_definition():
    weight = Parameter(torch.zeros(3, dtype=torch.float16))
    ema = start_ema({"w": weight}, 0.8)
    expected = torch.zeros(3)
    for n in range(20):
        weight.data = torch.full((3,), float(n + 1), dtype=torch.float16)
        decay = min(0.8, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
        ema.update({"w": weight})
    assert torch.allclose(ema.average["w"], expected) and ema.average["w"].dtype == torch.float32 and ema.updates == 20


def test_the_average_is_applied_and_taken_off():
    weight = Parameter(torch.ones(3))
    ema = start_ema({"w": weight}, 0.8)
    weight.data = torch.full((3,), 5.0)
    with pytest.raises(KeyError), ema.applied({"w": weight}):
        assert torch.equal(weight, torch.ones(3))
        raise KeyError
    assert torch.equal(weight, torch.full((3,), 5.0))
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        start_ema({"w": weight}, 1.0)
