"""What an online run would do, in numbers a person can check before it starts. Loads no model."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from diffusion_align.commands.course import describe_course
from diffusion_align.commands.model_facts import read_model_facts
from diffusion_align.commands.plan import describe_rate
from diffusion_align.commands.score import require_reward
from diffusion_align.commands.sources import present_model, read_prompts
from diffusion_align.objectives import stepwise_range
from diffusion_align.options import TrainD3po, TrainOnline, TrainPrdp, TrainSpo, to_yaml
from diffusion_align.options.train_online import window_starts
from diffusion_align.shapes import sample_captions

TINY_PROMPTS, TINY_SEED = 4000, 7  # of the training split; no seed of build_tiny's or of evaluate's


@dataclass(frozen=True)
class Rounds:
    """How long an online run is. `pictures_per_prompt` are those in the network together."""

    prompts_per_round: int
    prompts_per_step: int
    pictures_per_prompt: int
    steps_per_round: int
    steps: int

    @property
    def pictures_per_step(self) -> int:
        return self.prompts_per_step * self.pictures_per_prompt


def training_prompts(o: TrainOnline) -> list[str]:
    """The prompts that the options name; Raises ValueError for a file without one."""
    if o.prompts == "tiny":
        return sample_captions(o.num_prompts or TINY_PROMPTS, TINY_SEED)
    return read_prompts(o.prompts or "")[: o.num_prompts]


def rounds_of(o: TrainOnline, processes: int) -> Rounds:
    """Raises ValueError where a step's prompts cannot be shared out."""
    per_step = o.prompts_per_step or o.prompts_per_round
    if per_step % processes:
        raise ValueError(f"{per_step} prompts a step cannot be shared out to {processes} processes")
    per_round = o.passes * (o.prompts_per_round // per_step)
    steps = o.max_train_steps or o.num_rounds * per_round
    pictures = o.children if isinstance(o, TrainSpo) else o.group_size
    return Rounds(o.prompts_per_round, per_step, pictures, per_round, per_round * math.ceil(steps / per_round))


def describe_rounds(plan: Rounds) -> list[str]:
    rounds = plan.steps // plan.steps_per_round
    return [
        f"rounds           {rounds}, of {plan.prompts_per_round} prompts x {plan.pictures_per_prompt} pictures",
        f"steps            {plan.steps}, {plan.steps_per_round} a round, of {plan.prompts_per_step} prompts",
    ]


def evaluations(o: TrainOnline) -> dict[str, float]:
    """Network evaluations a prompt and round, a guided one counting twice; those of SPO if every pair is kept, and of a
    noise window the mean over its places."""
    guided = 1 if o.guidance == 1 else 2
    if isinstance(o, TrainSpo):
        places = window_starts(o) if o.noise_window else (o.start,)
        length = o.noise_window or o.steps - 1 - o.start  # the last step of a run has no noise
        ahead = guided * sum(_branched(o, start, length) for start in places) / len(places)
        second = 2 if o.solver == "dpmpp" and o.order == 2 else 1
        pairs = guided * length * second * (2 if o.segment > 1 else 1)
        return {"rollout": ahead, "policy with gradient": pairs * o.passes, "reference": pairs * o.passes}
    drawn, learnt = (guided * count for count in _asked(o))
    first = learnt * (o.passes - 1 if fresh(o) else o.passes) if isinstance(o, TrainPrdp) else 0
    found = {"rollout": drawn, "policy with gradient": learnt * o.passes}
    renewed = isinstance(o, TrainD3po) and o.reference == "round"  # it is then the policy that ran
    return {**found, **({"without": first} if first else {}), "reference": 0 if renewed else learnt}


def _branched(o: TrainSpo, start: int, length: int) -> int:
    """States that SPO's rollout asks about: one a step on the way to `start`, then the children and where they look."""
    last = o.steps - 1
    ends = [min(k + o.segment, start + length) for k in range(start, start + length, o.segment)]
    looks = sum(min(o.lookahead, last - end) for end in ends)
    return start + 1 + (length + looks) * o.children


def _asked(o: TrainOnline) -> tuple[float, float]:
    """Of a prompt's pictures: states that a rollout asks the network about, and those that learning asks about. One
    state that they share is asked about once."""
    places = window_starts(o) if o.noise_window else (0,)
    back = 1 if o.solver == "dpmpp" and o.order == 2 else 0  # a second-order step also needs the state before

    def at(k: int, start: int) -> int:
        return 1 if o.share_initial_noise and k <= start else o.group_size

    drawn = [at(k, s) for s in places for k in range(o.steps)]
    count = o.noise_window or o.learn_steps or o.steps - 1  # the last step has no density
    learnt = [at(k, s) for s in places for k in range(max(s - back, 0), s + count)]
    return sum(drawn) / len(places), sum(learnt) / len(places)


def fresh(o: TrainOnline) -> bool:
    """Whether a round's runs are learnt from once only, before any update: the rollout is then PRDP's first pass."""
    return o.passes == 1 and o.prompts_per_step in (None, o.prompts_per_round)


def plan_online(o: TrainOnline) -> list[str]:
    """The plan: rounds, evaluations, learning rate, D, constants in nats, what the loss can reach."""
    require_reward(o.reward)
    name = present_model(o.pretrained_model_name_or_path or "")
    facts = read_model_facts(name)
    dims = math.prod(facts.latent_shape(o.resolution))
    plan = rounds_of(o, int(os.environ.get("WORLD_SIZE", "1")))
    solver = f"{o.solver} order {o.order}" if o.solver == "dpmpp" else o.solver
    assumed = "" if facts.known else f" (not on this disk: figures are those of {facts.family})"
    return [
        f"model            {name}{assumed}",
        f"prompts          {len(training_prompts(o))} of {o.prompts}",
        f"sampler          {solver}, eta {o.eta:g}, {o.steps} steps{_window(o)}",
        *describe_rounds(plan),
        f"evaluations      a prompt and round: {' + '.join(f'{n:g} {word}' for word, n in evaluations(o).items())}",
        describe_rate(o.learning_rate, o.scale_lr, plan.pictures_per_step),
        *describe_course(o, plan.steps, o.learning_rate * (plan.pictures_per_step if o.scale_lr else 1)),
        f"latent dims D    {dims}",
        *describe_constants(o, dims),
    ]


def _window(o: TrainOnline) -> str:
    if o.noise_window is None:
        return ""
    starts = window_starts(o)
    places = f"{starts[0]} .. {starts[-1]}" if len(starts) > 1 else str(starts[0])
    return f", noise in {o.noise_window} of them from step {places} on, drawn anew each round"


def describe_constants(o: Any, dims: int) -> list[str]:
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
        over = unit * (o.noise_window or o.learn_steps or o.steps - 1 if o.log_ratio_unit == "mean" else 1)
        clip = "none" if o.clip is None else f"{o.clip * unit:.4g} nats a step"
        return [f"beta             {o.beta / over:.4g} per nat of a run", f"clip             {clip}"]
    return [f"clip             {o.clip * unit:.4g} nats a step", f"kl_weight        {o.kl_weight:g} per nat of a step"]


def dry_run(o: TrainOnline) -> int:
    """Print the resolved configuration and, as comments under it, the plan: the output is a file for --config."""
    verb = {"TrainD3po": "d3po", "TrainSpo": "spo", "TrainPrdp": "prdp", "TrainDdpo": "ddpo"}[type(o).__name__]
    print(to_yaml(o, f"train {verb}") + "\n" + "\n".join(f"# {line}" for line in plan_online(o)))
    return 0
