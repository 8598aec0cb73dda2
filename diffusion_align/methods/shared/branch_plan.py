"""The plan of SPO: rounds whose steps take pairs, the steps at which it compares, and network evaluations."""

from __future__ import annotations

import math
from functools import partial

from diffusion_align.methods.shared.rollout_plan import RoundPlan, RunTables, mean_evaluations, plan_prompts
from diffusion_align.options import TrainSpo
from diffusion_align.options.train.spo import compared_from
from diffusion_align.samplers import StepTable


def plan_rounds(o: TrainSpo, processes: int, tables: RunTables) -> RoundPlan:
    """Raises ValueError if the prompts cannot be divided equally among the processes."""
    return plan_prompts(o, processes) if o.pairs_per_step is None else plan_pairs(o, processes, tables)


def plan_pairs(o: TrainSpo, processes: int, tables: RunTables) -> RoundPlan:
    """Rounds whose steps take pairs. Raises ValueError if prompts cannot be divided equally among the processes."""
    n, per_step = o.prompts_per_round, o.pairs_per_step or 1
    if n % processes:
        raise ValueError(f"{n} prompts per round cannot be divided equally among {processes} processes")
    of_state = 1 if o.pairs == "best_worst" else o.children * (o.children - 1) // 2
    most = max(len(compared(o, table)) for table in tables.of_rounds) * of_state * n
    per_round = o.passes * math.ceil(most / per_step)
    if o.max_train_steps is not None:
        rounds = math.ceil(o.max_train_steps / per_round)
        return RoundPlan(n, n, o.children, per_round, o.max_train_steps, rounds, per_step)
    return RoundPlan(n, n, o.children, per_round, per_round * o.num_rounds, o.num_rounds, per_step, o.num_rounds)


def compared(o: TrainSpo, table: StepTable) -> list[int]:
    """The steps with noise at whose ends SPO compares: from `start` on, or all in a noise window."""
    return [k for k in range(compared_from(o), len(table)) if table.stochastic[k]]


def evaluations(o: TrainSpo, tables: RunTables) -> dict[str, float]:
    """Network evaluations per prompt and round, if every pair is kept."""
    drawn, learnt = mean_evaluations(o, tables, partial(_branched, o))
    return {"rollout": drawn, "policy with gradient": learnt * o.passes, "reference": learnt * o.passes}


def _branched(o: TrainSpo, table: StepTable) -> tuple[int, int]:
    """Network evaluations per prompt, of the rollout (one per step before the first comparison, then one per child and
    step of its look-ahead) and of learning."""
    steps, last = compared(o, table), len(table) - 1
    ends = [min(k + o.segment, steps[-1] + 1) for k in steps[:: o.segment]]
    looks = sum(max(0, min(o.lookahead, last - end)) for end in ends)
    # Children of the last step are finished pictures, which need no evaluation.
    children = len(steps) - (steps[-1] == last)
    back = int(table.order[steps].max())  # second-order steps also need the state before
    return steps[0] + 1 + (children + looks) * o.children, len(steps) * back * (2 if o.segment > 1 else 1)
