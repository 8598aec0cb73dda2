"""A resumed run is the saved one: every option counts but those of a named list."""

from pathlib import Path

import pytest

from diffusion_align.commands.train.identity import (
    ADDED,
    FREE,
    FREE_SECTIONS,
    SETTLED,
    facts_of,
    identity_of,
    require_same_run,
)
from diffusion_align.options import VERBS, options_of
from diffusion_align.train.checkpoints.store import Checkpoint, CheckpointError

TRAINING = [verb for verb in VERBS.values() if verb.method]


def identity(options, **found):
    return identity_of(options, found, learning_rate=1e-4, steps=10)


@pytest.mark.parametrize("verb", TRAINING, ids=lambda verb: verb.words)
def test_every_option_counts_unless_it_is_listed(verb):
    options = verb.options(lr_scheduler="constant")  # with which no number of steps of the run counts
    counted = set(identity(options)) - {"learning_rate", "rollout.steps"}
    described = options_of(verb.options)
    listed = {name for name, option in described.items() if option.section in FREE_SECTIONS} | FREE | SETTLED
    assert counted == set(described) - listed


def test_the_lists_name_options_that_exist():
    known = set().union(*(options_of(verb.options) for verb in TRAINING))
    assert known >= FREE | SETTLED | set(ADDED) and not FREE & SETTLED


def saved(options, **more):
    state = {"identity": identity(options) | more, "processes": 1}
    return Checkpoint(Path("run/checkpoints/step-00000001"), 1, {}, state)


def test_what_earlier_versions_compared_and_this_one_settles_otherwise_does_not_hinder_a_resume():
    """Runs of online methods had the number of prompts in their identity, beside the digest of the prompts."""
    options = VERBS["train d3po"].options()
    facts = facts_of(options, number=3)
    assert require_same_run(options, saved(options, num_prompts=None), identity(options), facts, 1) is None
    with pytest.raises(CheckpointError, match="beta was 0.2 and is now 0.1"):
        require_same_run(options, saved(options, beta=0.2), identity(options), facts, 1)
    with pytest.raises(CheckpointError, match="unheard_of was 1"):
        require_same_run(options, saved(options, unheard_of=1), identity(options), facts, 1)


def test_the_samplers_steps_count_whatever_the_learning_rate_does():
    """Both numbers are called steps: of a decaying rate the run's takes the name."""
    old, new = (VERBS["train d3po"].options(lr_scheduler="linear", steps=steps) for steps in (20, 10))
    facts = facts_of(new, number=3)
    with pytest.raises(CheckpointError, match="rollout.steps was 20 and is now 10"):
        require_same_run(new, saved(old), identity(new), facts, 1)
    before = saved(old)
    del before.state["identity"]["rollout.steps"]  # as earlier versions saved it
    assert require_same_run(old, before, identity(old), facts, 1) is None
