"""The options of `train ddpo`, beside those of every online method."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass

from ..schema import option
from ..verb import Verb
from .metric_names import RUNS
from .online import TrainOnline, check_online, notes_online

METRICS = RUNS


@dataclass(frozen=True)
class TrainDdpo(TrainOnline):
    # fmt: off
    output_dir: str = option("runs/ddpo", "output", "the run folder", path="folder")
    clip: float = option(1e-4, "train", "the ratio to the policy that drew the trajectory is clipped to 1 -+ this, in log_ratio_unit", above=0, below=1)
    advantage_std: str = option("group", "train", "rewards are centred in their group and divided by the group's standard deviation (GRPO), or by none", choices=("group", "none"))
    kl_weight: float = option(0.0, "train", "weight of the KL to the reference, in nats per step (DPOK, GRPO)", at_least=0)
    log_ratio_unit: str = option("mean", "train", "unit of clip: mean (over dims, as published) or nats (summed)", choices=("mean", "nats"))
    # fmt: on


def check_ddpo(options: TrainDdpo) -> None:
    """As `check_online`."""
    check_online(options, METRICS)


VERB = Verb(
    "train ddpo",
    TrainDdpo,
    check_ddpo,
    "DDPO, GRPO, DPOK: policy gradients with a clipped ratio, as a baseline.",
    method="ddpo",
    notes=notes_online,
)
