"""The options of `train spo`, beside those of every online method."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from ..names import UsageError
from ..schema import option
from ..verb import Verb
from .metric_names import ALWAYS, SIDES
from .online import UNITS, TrainOnline, check_online, noisy_steps, notes_online

METRICS = (*ALWAYS, "dims", "score_mean", "kept", *SIDES, "kl", "gap", "items")


@dataclass(frozen=True)
class TrainSpo(TrainOnline):
    # fmt: off
    output_dir: str = option("runs/spo", "output", "the run folder", path="folder")
    beta: float = option(10.0, "train", "scale of the log-ratios, in log_ratio_unit", above=0)
    clip: float | None = option(0.1, "train", "each ratio is clamped to 1 -+ this, in log_ratio_unit; none: no clamp", above=0, below=1)
    log_ratio_unit: str = option("mean", "train", UNITS, choices=("mean", "nats"))
    children: int = option(4, "rollout", "children of a state, which are compared at each step; K of the paper", at_least=2)
    start: int = option(4, "rollout", "first step at which children are compared; with a noise_window they are compared in the window", at_least=0, one_of="learned")
    threshold: float = option(0.3, "rollout", "keep a pair if the softmax probabilities of its scores differ by more than this", at_least=0, below=1)
    pairs: str = option("best_worst", "rollout", "pairs of the children of a state: best_worst (one pair, as published), or all pairs above the threshold", choices=("best_worst", "all"))
    segment: int = option(1, "rollout", "steps between comparisons; above 1 it is the paper's MSPO for SDXL, which has 4", at_least=1)
    lookahead: int = option(0, "rollout", "steps without noise that continue each child before its predicted picture is scored, for rewards of finished pictures; with the value of steps: to the end", at_least=0)
    pairs_per_step: int | None = option(None, "train", "pairs of an optimizer step, over all devices, in random order within the round; the last step of a round takes the remaining pairs (default: all pairs of prompts_per_step prompts)", at_least=1, one_of="step")
    preference_model: str | None = option(None, "reward", "a step-aware preference model: a folder of reward train-spm, a file as SPO's authors publish it, or theirs by name: spo-sd15, spo-sdxl; default: the reward, on the predicted picture at every step", path="name")
    # fmt: on
    pictures_option: ClassVar[str] = "children"


def compared_from(options: TrainSpo) -> int:
    """The first step at which SPO may compare: 0 with a noise window, which alone decides then."""
    return options.start if options.noise_window is None else 0


def check_spo(options: TrainSpo) -> None:
    """`check_online`, and whether there are steps to compare at."""
    check_online(options, METRICS)
    if options.reward == "people":
        raise UsageError("reward people chooses between finished pictures, and spo compares steps: train d3po or prdp")
    if options.learn_steps is not None:
        raise UsageError("rollout.learn_steps is not for spo, which learns where it compares: --start, --noise_window")
    if options.pairs_per_step is not None and options.prompts_per_step is not None:
        raise UsageError("train.pairs_per_step and train.prompts_per_step each say what a step takes: give one")
    if options.noise_window is None and options.start >= noisy_steps(options):
        raise UsageError(f"rollout.start {options.start} leaves none of {options.steps} steps to compare at")


def notes_spo(options: TrainSpo, given: Collection[str]) -> list[str]:
    """One line for each option that has no effect, or an unexpected one, in SPO."""
    notes = [
        f"{name} has no effect: spo compares the children of one state"
        for name in ("group_size", "share_initial_noise")
        if name in given
    ]
    if options.pairs_per_step and options.max_train_steps is None and not options.lr_scheduler.startswith("constant"):
        notes.append(
            f"lr_scheduler {options.lr_scheduler} covers the most steps that num_rounds can have, so it ends above 0 if "
            "pairs are not kept; with max_train_steps the run has exactly that many steps"
        )
    if options.noise_window is not None and "start" in given:
        notes.append("start has no effect with noise_window: spo compares in the window")
    return notes + notes_online(options, given)


VERB = Verb(
    "train spo",
    TrainSpo,
    check_spo,
    "SPO: learn at each step from the children of one state, compared by a step-aware preference model.",
    method="spo",
    notes=notes_spo,
)
