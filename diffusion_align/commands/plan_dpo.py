"""What `train dpo` would do, as lines of text: everything that can be known without loading a model."""

from __future__ import annotations

import os

from diffusion_align.commands.course import describe_course
from diffusion_align.commands.model_facts import read_model_facts
from diffusion_align.commands.plan import (
    describe_beta,
    describe_loss,
    describe_rate,
    describe_steps,
    describe_trained,
    steps_of,
)
from diffusion_align.commands.sources import fetch_pairs, pairs_name, pairs_of, present_model
from diffusion_align.data import Counts, Pair, read_pairs
from diffusion_align.options import TrainDpo, TrainSpm, to_yaml
from diffusion_align.schedule import Schedule


def read_training_pairs(o: TrainDpo | TrainSpm) -> tuple[list[Pair], Counts]:
    """The pairs that the options name, from this disk or else from the hub."""
    split, path = o.dataset_split_name or "train", pairs_of(o)
    found = path if path is not None else fetch_pairs(pairs_name(o), split, o.cache_dir)
    return read_pairs(found, split=split, max_bad_fraction=o.max_bad_fraction)


def dry_run(o: TrainDpo) -> int:
    """Print the resolved configuration and, as comments under it, the plan: the output is a file for --config."""
    print(to_yaml(o, "train dpo") + "\n" + "\n".join(f"# {line}" for line in plan_dpo(o)))
    return 0


def plan_dpo(o: TrainDpo) -> list[str]:
    """The plan: batch, steps, learning rate, beta in every unit, loss, trained weights, data."""
    name = present_model(o.pretrained_model_name_or_path or "")
    facts = read_model_facts(name)
    schedule, shape = Schedule.from_config(facts.scheduler), facts.latent_shape(o.resolution)
    pairs, said = _count(o)
    plan = steps_of(
        o.train_batch_size,
        int(os.environ.get("WORLD_SIZE", "1")),
        o.gradient_accumulation_steps,
        o.num_train_epochs,
        o.max_train_steps,
        pairs,
    )
    assumed = "" if facts.known else f" (not on this disk: figures are those of {facts.family})"
    return [
        f"model            {name}{assumed}",
        f"pairs            {said}",
        *describe_steps(plan),
        describe_rate(o.learning_rate, o.scale_lr, plan.batch),
        *describe_course(o, plan.steps, o.learning_rate * (plan.batch if o.scale_lr else 1)),
        *describe_beta(o.beta_dpo, o.beta_convention, shape, schedule),
        describe_loss(o.loss_type, o.label_smoothing),
        f"trained          {describe_trained(o, facts)}",
    ]


def _count(o: TrainDpo) -> tuple[int | None, str]:
    """How many pairs there are, if they are on this disk; nothing is downloaded to plan."""
    if pairs_of(o) is None:
        return None, f"{pairs_name(o)}, on the hub: not counted"
    _, counts = read_training_pairs(o)
    used = min(counts.used, o.max_train_samples or counts.used)
    return used, f"{counts}" + (f", of which the first {used}" if used < counts.used else "")
