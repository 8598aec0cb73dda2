"""The options of `train prdp`, beside those of every online method."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass

from ..schema import option
from ..verb import Verb
from .metric_names import RUNS
from .online import TrainOnline, check_online, notes_online

METRICS = RUNS


@dataclass(frozen=True)
class TrainPrdp(TrainOnline):
    # fmt: off
    output_dir: str = option("runs/prdp", "output", "the run folder", path="folder")
    beta: float = option(3e-5, "train", "weight of the KL beside the reward, in log_ratio_unit", above=0)
    clip: float | None = option(1e-4, "train", "how far a step's log-ratio may move from the policy that drew it, in log_ratio_unit; none: any", above=0)
    log_ratio_unit: str = option("mean", "train", "unit of beta and clip: mean (over dims, and for beta over steps, as in the paper's code) or nats (summed over both)", choices=("mean", "nats"))
    # fmt: on


def check_prdp(options: TrainPrdp) -> None:
    """As `check_online`."""
    check_online(options, METRICS)


VERB = Verb(
    "train prdp",
    TrainPrdp,
    check_prdp,
    "PRDP: regress differences of log-ratios on differences of rewards.",
    method="prdp",
    notes=notes_online,
)
