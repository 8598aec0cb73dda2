"""What an online run would do, in numbers a person can check before it starts. Loads no model."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from diffusion_align.commands.course import describe_course
from diffusion_align.commands.model_facts import read_model_facts
from diffusion_align.commands.plan import describe_rate
from diffusion_align.commands.run_tables import RunTables, compared, evaluations, planned_tables
from diffusion_align.commands.sources import present_model, read_prompts
from diffusion_align.objectives import stepwise_range
from diffusion_align.options import TrainD3po, TrainOnline, TrainPrdp, TrainSpo, to_yaml
from diffusion_align.options.train_online import window_starts
from diffusion_align.shapes import sample_captions

TINY_PROMPTS, TINY_SEED = 4000, 7  # of the training split; no seed of build_tiny's or of evaluate's


@dataclass(frozen=True)
class Rounds:
    """How long an online run is. `pictures_per_prompt` are those in the network together.

    With `pairs_per_step` a round has as many steps as its pairs fill, so `steps_per_round` is the most. The run then
    ends after `max_rounds` rounds, and `steps` is the most; or, where that is None, after `steps`, and `rounds` are the
    fewest.
    """

    prompts_per_round: int
    prompts_per_step: int
    pictures_per_prompt: int
    steps_per_round: int
    steps: int
    rounds: int
    pairs_per_step: int | None = None
    max_rounds: int | None = None

    @property
    def batch(self) -> int:
        """What a step takes: pairs where it is counted in them, else pictures."""
        return self.pairs_per_step or self.prompts_per_step * self.pictures_per_prompt


def training_prompts(o: TrainOnline) -> list[str]:
    """The prompts that the options name; Raises ValueError for a file without one."""
    if o.prompts == "tiny":
        return sample_captions(o.num_prompts or TINY_PROMPTS, TINY_SEED)
    return read_prompts(o.prompts or "")[: o.num_prompts]


def rounds_of(o: TrainOnline, processes: int, tables: RunTables) -> Rounds:
    """Raises ValueError where a step's prompts cannot be shared out."""
    if isinstance(o, TrainSpo) and o.pairs_per_step is not None:
        return _rounds_of_pairs(o, processes, tables)
    per_step = o.prompts_per_step or o.prompts_per_round
    if per_step % processes:
        raise ValueError(f"{per_step} prompts a step cannot be shared out to {processes} processes")
    per_round = o.passes * (o.prompts_per_round // per_step)
    rounds = math.ceil((o.max_train_steps or o.num_rounds * per_round) / per_round)
    pictures = o.children if isinstance(o, TrainSpo) else o.group_size
    return Rounds(o.prompts_per_round, per_step, pictures, per_round, per_round * rounds, rounds)


def _rounds_of_pairs(o: TrainSpo, processes: int, tables: RunTables) -> Rounds:
    n, per_step = o.prompts_per_round, o.pairs_per_step or 1
    if n % processes:
        raise ValueError(f"{n} prompts a round cannot be shared out to {processes} processes")
    of_state = 1 if o.pairs == "best_worst" else o.children * (o.children - 1) // 2
    most = max(len(compared(o, table)) for table in tables.of_rounds) * of_state * n
    per_round = o.passes * math.ceil(most / per_step)
    if o.max_train_steps is not None:
        rounds = math.ceil(o.max_train_steps / per_round)
        return Rounds(n, n, o.children, per_round, o.max_train_steps, rounds, per_step)
    return Rounds(n, n, o.children, per_round, per_round * o.num_rounds, o.num_rounds, per_step, o.num_rounds)


def describe_rounds(plan: Rounds) -> list[str]:
    what = f"of {plan.prompts_per_round} prompts x {plan.pictures_per_prompt} pictures"
    if plan.pairs_per_step is None:
        return [
            f"rounds           {plan.rounds}, {what}",
            f"steps            {plan.steps}, {plan.steps_per_round} a round, of {plan.prompts_per_step} prompts",
        ]
    fewest, most = ("at least ", "") if plan.max_rounds is None else ("", "up to ")
    return [
        f"rounds           {fewest}{plan.rounds}, {what}",
        f"steps            {most}{plan.steps}, up to {plan.steps_per_round} a round, of {plan.pairs_per_step} pairs: "
        "as many as the kept pairs fill",
    ]


def plan_online(o: TrainOnline) -> list[str]:
    """The plan: rounds, evaluations, learning rate, D, constants in nats, what the loss can reach."""
    name = present_model(o.pretrained_model_name_or_path or "")
    facts = read_model_facts(name)
    dims = math.prod(facts.latent_shape(o.resolution))
    tables = planned_tables(o)
    plan = rounds_of(o, int(os.environ.get("WORLD_SIZE", "1")), tables)
    counts = evaluations(o, tables)
    solver = f"{o.solver} order {o.order}" if o.solver == "dpmpp" else o.solver
    assumed = "" if facts.known else f" (not on this disk: figures are those of {facts.family})"
    return [
        f"model            {name}{assumed}",
        f"prompts          {len(training_prompts(o))} of {o.prompts}",
        f"sampler          {solver}, eta {o.eta:g}, {_steps(o, tables)}",
        *describe_rounds(plan),
        f"evaluations      a prompt and round: {' + '.join(f'{n:g} {word}' for word, n in counts.items())}",
        describe_rate(o.learning_rate, o.scale_lr, plan.batch),
        *describe_course(o, plan.steps, o.learning_rate * (plan.batch if o.scale_lr else 1)),
        f"latent dims D    {dims}",
        *describe_constants(o, dims, tables),
    ]


def _steps(o: TrainOnline, tables: RunTables) -> str:
    """How many steps a run has, which of them have noise, and where it ends."""
    end = "noise-free" if o.final == "zero" else "at the noise level of t = 0"
    noisy = f"noise in {tables.noisy} of them"
    if o.noise_window is not None:
        starts = window_starts(o, tables.noisy)
        places = f"{starts[0]} .. {starts[-1]}" if len(starts) > 1 else str(starts[0])
        noisy = f"noise in {o.noise_window} of them from step {places} on, drawn anew each round"
    return f"{len(tables.whole)} steps, {noisy}; ends {end}"


def describe_constants(o: Any, dims: int, tables: RunTables) -> list[str]:
    """Each constant in nats, and where the loss starts and what it can reach."""
    unit = dims if o.log_ratio_unit == "mean" else 1
    if isinstance(o, TrainD3po | TrainSpo):
        low, high = stepwise_range(o.beta, o.clip)
        nats = "none" if o.clip is None else f"{math.log1p(-o.clip) * unit:.4g} .. {math.log1p(o.clip) * unit:.4g} nats"
        return [
            f"beta             {o.beta:g} on {o.log_ratio_unit} log-ratios = {o.beta / unit:.4g} per nat of a step",
            f"clamp            {nats} a step",
            f"loss             starts at log 2 = 0.6931, reaches [{low:.4f}, {high:.4f}]",
        ]
    if isinstance(o, TrainPrdp):
        over = unit * (o.noise_window or o.learn_steps or tables.noisy if o.log_ratio_unit == "mean" else 1)
        clip = "none" if o.clip is None else f"{o.clip * unit:.4g} nats a step"
        return [f"beta             {o.beta / over:.4g} per nat of a run", f"clip             {clip}"]
    return [f"clip             {o.clip * unit:.4g} nats a step", f"kl_weight        {o.kl_weight:g} per nat of a step"]


def dry_run(o: TrainOnline) -> int:
    """Print the resolved configuration and, as comments under it, the plan: the output is a file for --config."""
    verb = {"TrainD3po": "d3po", "TrainSpo": "spo", "TrainPrdp": "prdp", "TrainDdpo": "ddpo"}[type(o).__name__]
    print(to_yaml(o, f"train {verb}") + "\n" + "\n".join(f"# {line}" for line in plan_online(o)))
    return 0
