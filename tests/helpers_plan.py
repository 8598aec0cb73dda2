"""The plan of a run out of its options, piece by piece, without loading its model."""

from importlib import import_module

from diffusion_align.commands.train.plan import about_run
from diffusion_align.methods.shared import branch_plan, rollout_plan
from diffusion_align.options import VERBS, TrainSpo


def entry_of(options):
    """The method whose options these are."""
    return next(verb.entry() for verb in VERBS.values() if verb.options is type(options))


def planned_tables(options):
    """The step tables of a model that is not loaded."""
    return rollout_plan.run_tables(options, about_run(entry_of(options), options).schedule)


def rounds_of(options, processes, tables):
    """Rounds and steps of an online method."""
    if isinstance(options, TrainSpo):
        return branch_plan.plan_rounds(options, processes, tables)
    return rollout_plan.plan_prompts(options, processes)


def evaluations(options, tables):
    """Network evaluations of an online method, a prompt and round."""
    name = entry_of(options).verb.removeprefix("train ")
    count = getattr(import_module(f"diffusion_align.methods.{name}"), "evaluations", rollout_plan.evaluations_of_runs)
    return count(options, tables)
