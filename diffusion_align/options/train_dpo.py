"""The options of `train dpo`, beside those of every offline method."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .names import UsageError
from .schema import option
from .train_common import TrainOffline, check_offline


@dataclass(frozen=True)
class TrainDpo(TrainOffline):
    # fmt: off
    beta_dpo: float = option(2500.0, "train", "pull towards the reference, in the unit of beta_convention", aliases=("beta",), above=0)
    beta_convention: str = option("diffusers", "train", "unit of beta_dpo: diffusers (mean over dims), salesforce (mean over dims and a hidden 1/2, so 5000 there is 2500 here) or sum (over dims)", choices=("diffusers", "salesforce", "sum"))
    loss_type: str = option("sigmoid", "train", "objective on the margin", choices=("sigmoid", "ipo", "hinge", "robust"))
    label_smoothing: float = option(0.0, "train", "assumed share of flipped labels, for sigmoid and robust", at_least=0, below=0.5)
    # fmt: on


def notes_train_dpo(options: TrainDpo, given: Collection[str]) -> list[str]:
    """One line for each value that is not taken as a person may think. `given` are the options that somebody set."""
    if "beta_dpo" in given and "beta_convention" not in given:
        return [
            f"beta_dpo {options.beta_dpo:g} is read in the unit of diffusers' script (mean over dims, no 1/2); "
            "a number from the paper's code needs --beta_convention salesforce"
        ]
    return []


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
