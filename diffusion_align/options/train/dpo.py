"""The options of `train dpo`, beside those of every offline method."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from diffusion_align.vocabulary import BETA_CONVENTIONS

from ..names import UsageError
from ..schema import option
from ..verb import Verb
from .common import TrainOffline, check_data, check_train
from .metric_names import ALWAYS, PAIRS, quantiles_of

# The published constants of each loss: the defaults if loss_type is set.
# The default of diffusers' script for the first three losses; robust DPO has no published value for diffusion.
_MARGIN = {"beta_dpo": 2500.0, "beta_convention": "diffusers"}
# jacklishufan/diffusion-kto: the default of train_kto_sd_v1.5.py, a mean over dims without a 1/2; its launcher keeps it.
_KTO = {"beta_dpo": 1000.0, "beta_convention": "diffusers"}

OF_MARGIN = ("sigmoid", "ipo", "hinge", "robust")
PUBLISHED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(OF_MARGIN, _MARGIN),
    "kto": _KTO,
    "kto_pairs": _KTO,
    "mapo": _MARGIN,  # it uses no beta_dpo
    # huaishengzhu/DSPO, launchers/sd15.sh: its one --beta_dpo is dspo_strength too, and the sigmoid halves it.
    "dspo": {"beta_dpo": 0.001, "beta_convention": "salesforce"},
}
_METRICS = {
    "kto": (*ALWAYS, "implicit_accuracy", "winner_error_gap", "loser_error_gap", "baseline_logit")
    + quantiles_of("log_ratio"),
    "mapo": (*ALWAYS, "winner_error", "loser_error"),
}


@dataclass(frozen=True)
class TrainDpo(TrainOffline):
    # fmt: off
    beta_dpo: float = option(2500.0, "train", "strength of the pull towards the reference, in the unit of beta_convention (default by loss: 2500, kto 1000 diffusers, dspo 0.001 salesforce)", aliases=("beta",), above=0)
    beta_convention: str = option("diffusers", "train", "unit of beta_dpo: diffusers (mean over dims), salesforce (mean over dims, and a factor of 1/2, so its 5000 is 2500 of diffusers) or sum (over dims)", choices=BETA_CONVENTIONS)
    loss_type: str = option("sigmoid", "train", "objective: of the margin (sigmoid, ipo, hinge, robust); of single liked and disliked pictures (kto), or of both of a pair (kto_pairs); without a reference (mapo); of the winner alone (dspo)", choices=tuple(PUBLISHED), brings=PUBLISHED)
    label_smoothing: float = option(0.0, "train", "assumed fraction of flipped labels, for sigmoid and robust", at_least=0, below=0.5)
    winner_share: float | None = option(None, "train", "Diffusion-SDPO: scale the loser's gradient so that the winner's error does not rise, and keeps this fraction of its decrease; for losses of the margin (default: no scaling)", at_least=0, at_most=1)
    liked_share: float = option(0.8, "train", "kto: probability that a visit to a pair shows its winner, as liked, and not its loser (authors' launcher)", at_least=0, at_most=1)
    mapo_beta: float = option(0.1, "train", "weight of mapo's preference beside the winner's error (authors' code)", above=0)
    dspo_strength: float = option(0.001, "train", "how far dspo pushes the winner's target from the reference (authors' code)", above=0)
    # fmt: on


def metrics_of(options: TrainDpo) -> tuple[str, ...]:
    """The metrics that this loss writes."""
    return _METRICS.get(options.loss_type, PAIRS)


def notes_train_dpo(options: TrainDpo, given: Collection[str]) -> list[str]:
    """One line for each value that has no effect or an unexpected unit. `given`: the options that the user set."""
    belongs = {"liked_share": "kto", "mapo_beta": "mapo", "dspo_strength": "dspo"}
    notes = [
        f"{name} has no effect: it belongs to loss_type {loss}"
        for name, loss in belongs.items()
        if name in given and options.loss_type != loss
    ]
    if options.loss_type == "mapo" and "beta_dpo" in given:
        notes.append("beta_dpo has no effect: mapo has no reference, its weight is mapo_beta")
    elif "beta_dpo" in given and "beta_convention" not in given and options.beta_convention == "diffusers":
        notes.append(
            f"beta_dpo {options.beta_dpo:g} is in the unit of diffusers' script (mean over dims, no 1/2); "
            "a number from the paper's code needs --beta_convention salesforce"
        )
    return notes


def check_train_dpo(options: TrainDpo) -> None:
    """Check the options together.

    Raises:
        UsageError: options that contradict each other, or a missing one.
    """
    check_train(options, metrics_of(options))
    check_data(options)
    if options.label_smoothing and options.loss_type not in ("sigmoid", "robust"):
        raise UsageError(
            f"train.label_smoothing has no effect for loss_type {options.loss_type}; use sigmoid or robust"
        )
    if options.winner_share is not None and options.loss_type not in OF_MARGIN:
        raise UsageError(
            f"train.winner_share is for losses of the margin, not loss_type {options.loss_type}; "
            f"use {', '.join(OF_MARGIN[:-1])} or {OF_MARGIN[-1]}"
        )


VERB = Verb(
    "train dpo",
    TrainDpo,
    check_train_dpo,
    "Diffusion-DPO: learn from pairs of pictures, one preferred.",
    method="dpo",
    notes=notes_train_dpo,
)
