"""The course of the learning rate: a warm-up that nobody set is short, and one that is too long is told."""

import pytest
import torch

from diffusion_align.commands.train.course import describe_course, make_optimizer, settle_warmup
from diffusion_align.commands.train.identity import identity_of
from diffusion_align.commands.train.plan import dry_run
from diffusion_align.options import VERBS, TrainDdpo, TrainDpo, TrainSpm


def rates(o, steps):
    """The rate of each step, relative to the one asked for."""
    optimizer, scheduler = make_optimizer(o, [torch.nn.Parameter(torch.zeros(1))], 1.0, steps)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_a_cosine_schedule_of_100_steps_reaches_its_rate():
    """With the 500 steps of warm-up that scripts have by default it would end at 99 / 500 of it."""
    o = settle_warmup(TrainDpo(lr_scheduler="cosine"), 100)
    assert o.lr_warmup_steps == 10 and max(rates(o, 100)) == 1.0
    given = settle_warmup(TrainDpo(lr_scheduler="cosine", lr_warmup_steps=500), 100)
    assert given.lr_warmup_steps == 500 and max(rates(given, 100)) == pytest.approx(99 / 500)


@pytest.mark.parametrize(
    ("options", "steps", "warmup"),
    [
        (TrainDpo(lr_scheduler="linear"), 5, 0),
        (TrainDpo(lr_scheduler="constant_with_warmup"), 2000, 200),
        (TrainDpo(lr_scheduler="polynomial"), 5000, 500),
        (TrainDdpo(lr_scheduler="cosine"), 100_000, 500),
        (TrainSpm(), 40, 4),
        (TrainDpo(lr_scheduler="cosine", lr_warmup_steps=0), 40, 0),
        (TrainDpo(lr_scheduler="constant"), 40, None),
    ],
)
def test_the_warm_up_that_nobody_set_is_at_most_a_tenth(options, steps, warmup):
    assert settle_warmup(options, steps).lr_warmup_steps == warmup


def test_the_schedule_is_printed_and_warns_if_the_rate_is_never_reached():
    assert describe_course(TrainDpo(), 100, 1e-4) == ["course           constant"]
    assert describe_course(TrainDpo(lr_scheduler="cosine"), 100, 1e-4) == [
        "course           rises over 10 steps, then cosine to 0 at step 100"
    ]
    lines = describe_course(TrainDpo(lr_scheduler="cosine", lr_warmup_steps=500), 100, 1e-4)
    assert "the rate reaches at most 1.98e-05, 19.8 % of 0.0001" in lines[1] and "lower --lr_warmup_steps" in lines[1]
    assert len(describe_course(TrainDpo(lr_scheduler="linear", lr_warmup_steps=50), 100, 1e-4)) == 1
    assert "unknown until the data are counted" in describe_course(TrainDpo(), None, 1e-4)[0]


def test_the_plan_shows_the_learning_rate_schedule(capsys):
    o = TrainDpo(pretrained_model_name_or_path="tiny", dataset_name="tiny", max_train_steps=100, lr_scheduler="linear")
    assert dry_run(VERBS["train dpo"].entry(), o) == 0
    assert "# course           rises over 10 steps, then linear to 0 at step 100\n" in capsys.readouterr().out


def test_runs_with_a_constant_rate_resume_from_old_checkpoints():
    identity = identity_of(TrainDpo(), {}, learning_rate=1.0, steps=100)
    assert identity["lr_warmup_steps"] == 500
