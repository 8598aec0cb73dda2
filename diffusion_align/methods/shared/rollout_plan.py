"""The step tables of an online run, and its plan: rounds, steps and network evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from diffusion_align.options import TrainOnline
from diffusion_align.options.train.online import window_starts
from diffusion_align.samplers import StepTable, noise_window, step_table
from diffusion_align.schedule import Schedule


@dataclass(frozen=True, eq=False)
class RunTables:
    """whole: noise in every step that can have it. quiet: the same grid at eta = 0. of_rounds: each round draws one of
    these; without a noise window the only one is `whole`."""

    whole: StepTable
    quiet: StepTable
    of_rounds: list[StepTable]

    @property
    def noisy(self) -> int:
        """How many steps of `whole` have noise, and therefore a density."""
        return int(self.whole.stochastic.sum())


def run_tables(o: TrainOnline, schedule: Schedule) -> RunTables:
    """Raises ValueError if the noise window of the options does not fit the grid."""
    order = o.order if o.solver == "dpmpp" else 1
    grid = {"solver": o.solver, "order": order, "spacing": o.spacing, "final": o.final}
    whole, quiet = (step_table(schedule, o.steps, eta=eta, **grid) for eta in (o.eta, 0.0))
    if o.noise_window is None:
        return RunTables(whole, quiet, [whole])
    noisy = int(whole.stochastic.sum())
    starts = window_starts(o, noisy)
    if not starts:
        raise ValueError(
            f"{o.spacing} steps of this model end at t = 0, so {noisy} of {o.steps} have noise: a noise_window of "
            f"{o.noise_window} starts at {noisy - o.noise_window} at the latest, not at {o.window_first}"
        )
    return RunTables(whole, quiet, [noise_window(whole, quiet, k, o.noise_window) for k in starts])


def evaluations_of_runs(o: TrainOnline, tables: RunTables) -> dict[str, float]:
    """Network evaluations per prompt and round, of a method that learns from the trajectories of a prompt."""
    drawn, learnt = mean_evaluations(o, tables, lambda table: _of_runs(o, table))
    return {"rollout": drawn, "policy with gradient": learnt * o.passes, "reference": learnt}


def mean_evaluations(
    o: TrainOnline, tables: RunTables, count: Callable[[StepTable], tuple[int, int]]
) -> tuple[float, float]:
    """Network evaluations per prompt, of the rollout and of learning. Guidance counts twice; with a noise window it is
    the mean over its places. `count`: the states evaluated in rollout and learning under one table."""
    guided = (1 if o.guidance == 1 else 2) / len(tables.of_rounds)
    drawn, learnt = (guided * sum(found) for found in zip(*map(count, tables.of_rounds), strict=True))
    return drawn, learnt


def _of_runs(o: TrainOnline, table: StepTable) -> tuple[int, int]:
    """States of a prompt's pictures that rollout and learning evaluate; a state that they share is evaluated once."""
    noisy = [k for k in range(len(table)) if table.stochastic[k]]
    learnt = noisy if o.learn_steps is None else [k for k in noisy if k < o.learn_steps]
    needed = {k - back for k in learnt for back in range(int(table.order[k]))}

    def at(k: int) -> int:
        return 1 if o.share_initial_noise and k <= noisy[0] else o.group_size

    return sum(at(k) for k in range(len(table))), sum(at(k) for k in needed)


@dataclass(frozen=True)
class RoundPlan:
    """How long an online run is. `pictures_per_prompt`: pictures that are drawn together.

    With `pairs_per_step` the number of steps of a round depends on its pairs, and `steps_per_round` is a maximum. The
    run then ends after `max_rounds` rounds, and `steps` is a maximum; or, if that is None, after `steps` steps, and
    `rounds` is a minimum.
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
        """Items of a step: pairs if `pairs_per_step` is set, else pictures."""
        return self.pairs_per_step or self.prompts_per_step * self.pictures_per_prompt


def plan_prompts(o: TrainOnline, processes: int) -> RoundPlan:
    """Rounds whose steps take prompts. Raises ValueError if these cannot be divided equally among the processes."""
    per_step = o.prompts_per_step or o.prompts_per_round
    if per_step % processes:
        raise ValueError(f"{per_step} prompts per step cannot be divided equally among {processes} processes")
    per_round = o.passes * (o.prompts_per_round // per_step)
    rounds = math.ceil((o.max_train_steps or o.num_rounds * per_round) / per_round)
    return RoundPlan(o.prompts_per_round, per_step, o.pictures_per_prompt, per_round, per_round * rounds, rounds)


def describe_rounds(plan: RoundPlan) -> list[str]:
    what = f"of {plan.prompts_per_round} prompts x {plan.pictures_per_prompt} pictures"
    if plan.pairs_per_step is None:
        return [
            f"rounds           {plan.rounds}, {what}",
            f"steps            {plan.steps}, {plan.steps_per_round} per round, of {plan.prompts_per_step} prompts",
        ]
    fewest, most = ("at least ", "") if plan.max_rounds is None else ("", "up to ")
    return [
        f"rounds           {fewest}{plan.rounds}, {what}",
        f"steps            {most}{plan.steps}, up to {plan.steps_per_round} per round, of {plan.pairs_per_step} pairs: "
        "the number depends on the kept pairs",
    ]


def describe_sampler(o: TrainOnline, tables: RunTables) -> str:
    """The sampler, how many steps a trajectory has, which of them have noise, and where it ends."""
    solver = f"{o.solver} order {o.order}" if o.solver == "dpmpp" else o.solver
    end = "without noise" if o.final == "zero" else "at the noise level of t = 0"
    noisy = f"noise in {tables.noisy} of them"
    if o.noise_window is not None:
        starts = window_starts(o, tables.noisy)
        places = f"{starts[0]} .. {starts[-1]}" if len(starts) > 1 else str(starts[0])
        noisy = f"noise in {o.noise_window} of them from step {places} on, drawn for each round"
    return f"sampler          {solver}, eta {o.eta:g}, {len(tables.whole)} steps, {noisy}; ends {end}"
