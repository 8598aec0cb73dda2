"""The sampler of an online run as step tables: what the run walks, and what its plan is counted from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusion_align.commands.model_facts import read_model_facts
from diffusion_align.options import TrainD3po, TrainOnline, TrainPrdp, TrainSpo
from diffusion_align.options.train_online import compared_from, window_starts
from diffusion_align.samplers import StepTable, noise_window, step_table
from diffusion_align.schedule import Schedule


@dataclass(frozen=True, eq=False)
class RunTables:
    """whole: noise in every step that can have it. quiet: the same grid at eta = 0. of_rounds: the table of a round is
    one of these, drawn anew each round; without a noise window it is always `whole`."""

    whole: StepTable
    quiet: StepTable
    of_rounds: list[StepTable]

    @property
    def noisy(self) -> int:
        """How many steps of `whole` have noise, and so a density."""
        return int(self.whole.stochastic.sum())


def run_tables(o: TrainOnline, schedule: Schedule) -> RunTables:
    """Raises ValueError where the grid leaves no place for the noise window that the options ask for."""
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


def planned_tables(o: TrainOnline) -> RunTables:
    """The tables of a model that is not loaded, from its scheduler's file or, without one, its family's schedule."""
    return run_tables(o, Schedule.from_config(read_model_facts(o.pretrained_model_name_or_path or "").scheduler))


def fresh(o: TrainOnline) -> bool:
    """Whether a round's runs are learnt from once only, before any update: the rollout is then PRDP's first pass."""
    return o.passes == 1 and o.prompts_per_step in (None, o.prompts_per_round)


def evaluations(o: TrainOnline, tables: RunTables) -> dict[str, float]:
    """Network evaluations a prompt and round, a guided one counting twice; those of SPO if every pair is kept, and of a
    noise window the mean over its places."""
    guided = (1 if o.guidance == 1 else 2) / len(tables.of_rounds)
    count = _branched if isinstance(o, TrainSpo) else _asked
    asked = [count(o, table) for table in tables.of_rounds]
    drawn, learnt = (guided * sum(counts) for counts in zip(*asked, strict=True))
    found = {"rollout": drawn, "policy with gradient": learnt * o.passes}
    if isinstance(o, TrainSpo):
        return {**found, "reference": learnt * o.passes}
    first = learnt * (o.passes - 1 if fresh(o) else o.passes) if isinstance(o, TrainPrdp) else 0
    renewed = isinstance(o, TrainD3po) and o.reference == "round"  # it is then the policy that ran
    return {**found, **({"without": first} if first else {}), "reference": 0 if renewed else learnt}


def compared(o: TrainSpo, table: StepTable) -> list[int]:
    """The steps at whose ends SPO compares: those with noise, from `start` on where no window says where."""
    return [k for k in range(compared_from(o), len(table)) if table.stochastic[k]]


def _branched(o: Any, table: StepTable) -> tuple[int, int]:
    """Of a prompt: states that SPO's rollout asks the network about, one a step on the way to its first comparison and
    then the children and where they look; and states that learning asks about."""
    steps, last = compared(o, table), len(table) - 1
    ends = [min(k + o.segment, steps[-1] + 1) for k in steps[:: o.segment]]
    looks = sum(max(0, min(o.lookahead, last - end)) for end in ends)
    # Children of the last step are finished pictures, which the network is not asked about.
    children = len(steps) - (steps[-1] == last)
    back = int(table.order[steps].max())  # second-order steps also need the state before
    return steps[0] + 1 + (children + looks) * o.children, len(steps) * back * (2 if o.segment > 1 else 1)


def _asked(o: TrainOnline, table: StepTable) -> tuple[int, int]:
    """Of a prompt's pictures: states that a rollout asks the network about, and states that learning asks about. One
    state that the pictures share is asked about once."""
    noisy = [k for k in range(len(table)) if table.stochastic[k]]
    learnt = noisy if o.learn_steps is None else [k for k in noisy if k < o.learn_steps]
    needed = {k - back for k in learnt for back in range(int(table.order[k]))}

    def at(k: int) -> int:
        return 1 if o.share_initial_noise and k <= noisy[0] else o.group_size

    return sum(at(k) for k in range(len(table))), sum(at(k) for k in needed)
