"""The options of `train d3po`, beside those of every online method."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass

from ..schema import option
from ..verb import Verb
from .metric_names import REWARD, SIDES
from .online import UNITS, TrainOnline, check_online, notes_online

METRICS = (*REWARD, *SIDES, "kl_w", "kl_l", "drift", "items")


@dataclass(frozen=True)
class TrainD3po(TrainOnline):
    # fmt: off
    output_dir: str = option("runs/d3po", "output", "the run folder", path="folder")
    beta: float = option(0.1, "train", "scale of the log-ratios, in log_ratio_unit", above=0)
    clip: float | None = option(0.1, "train", "each ratio is clamped to 1 -+ this, in log_ratio_unit; none: no clamp", above=0, below=1)
    log_ratio_unit: str = option("mean", "train", UNITS, choices=("mean", "nats"))
    reference: str = option("frozen", "train", "reference of the log-ratios: frozen (the base model) or round (the policy at the start of each round, as in the paper's experiments with people)", choices=("frozen", "round"))
    # fmt: on


def check_d3po(options: TrainD3po) -> None:
    """As `check_online`."""
    check_online(options, METRICS)


VERB = Verb(
    "train d3po",
    TrainD3po,
    check_d3po,
    "D3PO: learn from pairs of the model's own trajectories, ordered by a reward.",
    method="d3po",
    notes=notes_online,
)
