"""What `train rankdpo` would do, as lines of text: everything that can be known without loading a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion_align.commands.course import describe_course
from diffusion_align.commands.model_facts import read_model_facts
from diffusion_align.commands.plan import (
    Steps,
    accumulation_of,
    describe_beta,
    describe_rate,
    describe_steps,
    describe_trained,
    processes_here,
    steps_of,
)
from diffusion_align.commands.sources import fetch_pairs, pairs_name, pairs_of, present_model
from diffusion_align.data import Counts, Ranking, read_rankings
from diffusion_align.models.hub import asset
from diffusion_align.objectives import gain_weights, rank_dpo
from diffusion_align.options import TrainRankdpo, to_yaml
from diffusion_align.schedule import Schedule

TINY = "tiny_rankings.parquet"


def rankings_on_disk(o: TrainRankdpo) -> Path | None:
    """The path that the options mean on this disk; None for a data set on the hub.

    Raises:
        FileNotFoundError: the embedded rankings have not been built, with two cures.
    """
    if pairs_name(o) != "tiny":
        return pairs_of(o)
    try:
        return asset(TINY)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}, or make some in minutes: diffusion-align data synth --models tiny --prompts tiny --rewards tiny "
            "--guidance 1 --out synth, then --train_data_dir synth/rankings.parquet"
        ) from None


def read_training_rankings(o: TrainRankdpo) -> tuple[list[Ranking], Counts]:
    """The rankings that the options name, from this disk or else from the hub."""
    split, path = o.dataset_split_name or "train", rankings_on_disk(o)
    found = path if path is not None else fetch_pairs(pairs_name(o), split, o.cache_dir)
    return read_rankings(found, split=split, max_bad_fraction=o.max_bad_fraction)


def dry_run(o: TrainRankdpo) -> int:
    """Print the resolved configuration and, as comments under it, the plan: the output is a file for --config."""
    print(to_yaml(o, "train rankdpo") + "\n" + "\n".join(f"# {line}" for line in plan_rankdpo(o)))
    return 0


def plan_rankdpo(o: TrainRankdpo) -> list[str]:
    """The plan: batch, steps, evaluations, learning rate, beta in every unit, where the loss starts, weights, data."""
    name = present_model(o.pretrained_model_name_or_path or "")
    facts = read_model_facts(name)
    schedule, shape = Schedule.from_config(facts.scheduler), facts.latent_shape(o.resolution)
    here = rankings_on_disk(o) is not None
    rankings, counts = read_training_rankings(o) if here else ([], None)
    used = rankings[: o.max_train_samples]
    said = f"{pairs_name(o)}, on the hub: not counted" if counts is None else str(counts)
    some = f", of which the first {len(used)}" if len(used) < len(rankings) else ""
    devices = processes_here()
    pieces = (o.train_batch_size, devices, accumulation_of(o, devices))
    plan = steps_of(*pieces, o.num_train_epochs, o.max_train_steps, len(used) if here else None)
    assumed = "" if facts.known else f" (not on this disk: figures are those of {facts.family})"
    return [
        f"model            {name}{assumed}",
        f"rankings         {said}{some}",
        *describe_prompts(plan),
        *(describe_lists(o, used) if here else []),
        describe_rate(o.learning_rate, o.scale_lr, plan.batch),
        *describe_course(o, plan.steps, o.learning_rate * (plan.batch if o.scale_lr else 1)),
        *describe_beta(o.beta_dpo, o.beta_convention, shape, schedule),
        f"trained          {describe_trained(o, facts)}",
    ]


def describe_prompts(plan: Steps) -> list[str]:
    """`describe_steps` in this method's word: what it counts are prompts, each with its ranking."""
    return [line.replace("pairs", "prompts") for line in describe_steps(plan)]


def describe_lists(o: TrainRankdpo, rankings: Sequence[Ranking]) -> list[str]:
    """How long the lists are, what they cost, and where the loss starts: all scores are 0 then."""
    lengths = Counter(len(ranking.pictures) for ranking in rankings)
    start = weight = 0.0
    for ranking in rankings:
        phi = torch.tensor([ranking.relevance], dtype=torch.float64)
        start += float(rank_dpo(0 * phi, phi, 1.0, pair_norm=o.pair_norm, discount=o.discount)) / len(rankings)
        weight += float(gain_weights(phi, o.discount).triu().sum()) / len(rankings)
    k = max(lengths)
    more = f" + {k} without" if o.one_picture_at_a_time else ""
    return [
        f"pictures         {', '.join(f'{k} for each of {n} prompts' for k, n in sorted(lengths.items()))}",
        f"evaluations      of {k} pictures: {k} policy with gradient{more} + {k} reference, {k * (k - 1) // 2} pairs",
        f"loss             starts at {start:.4f}, reaches (0, inf); a prompt's pairs weigh {weight:.4f} together",
    ]
