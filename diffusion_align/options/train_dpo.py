"""The options of `train dpo`, beside those of every offline method."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .losses import PUBLISHED
from .names import UsageError
from .schema import option
from .train_common import TrainOffline, check_offline


@dataclass(frozen=True)
class TrainDpo(TrainOffline):
    # fmt: off
    beta_dpo: float = option(2500.0, "train", "pull towards the reference, in the unit of beta_convention (default: the loss's own: 2500, kto 1000 diffusers, dspo 0.001 salesforce)", aliases=("beta",), above=0)
    beta_convention: str = option("diffusers", "train", "unit of beta_dpo: diffusers (mean over dims), salesforce (mean over dims and a hidden 1/2, so 5000 there is 2500 here) or sum (over dims)", choices=("diffusers", "salesforce", "sum"))
    loss_type: str = option("sigmoid", "train", "objective: of the margin (sigmoid, ipo, hinge, robust); of single liked and disliked pictures (kto), or of both of a pair (kto_pairs); without a reference (mapo); of the winner alone (dspo)", choices=tuple(PUBLISHED), brings=PUBLISHED)
    label_smoothing: float = option(0.0, "train", "assumed share of flipped labels, for sigmoid and robust", at_least=0, below=0.5)
    winner_share: float | None = option(None, "train", "Diffusion-SDPO: scale the loser's gradient so that the winner's error does not rise, and keeps this share of its fall; for losses of the margin (default: as it is)", at_least=0, at_most=1)
    liked_share: float = option(0.8, "train", "kto: probability that a visit to a pair shows its winner, as liked, and not its loser (authors' launcher)", at_least=0, at_most=1)
    mapo_beta: float = option(0.1, "train", "weight of mapo's preference beside the winner's error (authors' code)", above=0)
    dspo_strength: float = option(0.001, "train", "how far dspo pushes the winner's target from the reference (authors' code)", above=0)
    # fmt: on


def notes_train_dpo(options: TrainDpo, given: Collection[str]) -> list[str]:
    """One line for each value that is not taken as a person may think. `given` are the options that somebody set."""
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
            f"beta_dpo {options.beta_dpo:g} is read in the unit of diffusers' script (mean over dims, no 1/2); "
            "a number from the paper's code needs --beta_convention salesforce"
        )
    return notes


def check_train_dpo(options: TrainDpo) -> None:
    """What no single option can know.

    Raises:
        UsageError: options that contradict each other, or something needed that is missing.
    """
    check_offline(options)
    if options.label_smoothing and options.loss_type not in ("sigmoid", "robust"):
        raise UsageError(
            f"train.label_smoothing has no meaning for loss_type {options.loss_type}; use sigmoid or robust"
        )
    if options.winner_share is not None and options.loss_type not in ("sigmoid", "ipo", "hinge", "robust"):
        raise UsageError(
            f"train.winner_share is for losses of the margin, not loss_type {options.loss_type}; "
            "use sigmoid, ipo, hinge or robust"
        )
