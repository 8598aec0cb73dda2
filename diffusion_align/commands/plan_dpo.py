"""What `train dpo` would do, as lines of text: everything that can be known without loading a model."""

from __future__ import annotations

from diffusion_align.commands.course import describe_course
from diffusion_align.commands.model_facts import read_model_facts
from diffusion_align.commands.plan import (
    Steps,
    accumulation_of,
    describe_beta,
    describe_loss,
    describe_rate,
    describe_steps,
    describe_trained,
    processes_here,
    steps_of,
)
from diffusion_align.commands.setup_dpo import describe_constants, needs_reference
from diffusion_align.commands.sources import fetch_pairs, pairs_name, pairs_of, present_model
from diffusion_align.data import Counts, Pair, read_pairs
from diffusion_align.options import TrainDpo, TrainSpm, to_yaml
from diffusion_align.schedule import Schedule


def read_training_pairs(o: TrainDpo | TrainSpm) -> tuple[list[Pair], Counts]:
    """The pairs that the options name, from this disk or else from the hub."""
    split, path = o.dataset_split_name or "train", pairs_of(o)
    found = path if path is not None else fetch_pairs(pairs_name(o), split, o.cache_dir)
    ties = isinstance(o, TrainSpm) and o.keep_ties
    return read_pairs(found, split=split, max_bad_fraction=o.max_bad_fraction, keep_ties=ties)


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
    processes = processes_here()
    pieces = (o.train_batch_size, processes, accumulation_of(o, processes))
    plan = steps_of(*pieces, o.num_train_epochs, o.max_train_steps, pairs)
    assumed = "" if facts.known else f" (not on this disk: figures are those of {facts.family})"
    return [
        f"model            {name}{assumed}",
        f"pairs            {said}",
        *describe_batch(o, plan),
        describe_rate(o.learning_rate, o.scale_lr, plan.batch),
        *describe_course(o, plan.steps, o.learning_rate * (plan.batch if o.scale_lr else 1)),
        *(describe_beta(o.beta_dpo, o.beta_convention, shape, schedule) if needs_reference(o) else []),
        describe_loss(o.loss_type, o.label_smoothing),
        *describe_constants(o),
        f"trained          {describe_trained(o, facts)}",
    ]


def describe_batch(o: TrainDpo, plan: Steps) -> list[str]:
    """`describe_steps`; what KTO counts are visits to pairs, of which each shows one picture."""
    first, *others = describe_steps(plan)
    return [first + (", one picture of each" if o.loss_type == "kto" else ""), *others]


def _count(o: TrainDpo) -> tuple[int | None, str]:
    """How many pairs there are, if they are on this disk; nothing is downloaded to plan."""
    if pairs_of(o) is None:
        return None, f"{pairs_name(o)}, on the hub: not counted"
    _, counts = read_training_pairs(o)
    used = min(counts.used, o.max_train_samples or counts.used)
    return used, f"{counts}" + (f", of which the first {used}" if used < counts.used else "")
