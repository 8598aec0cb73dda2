"""The options of `train rankdpo`, beside those of every offline method.

The paper reports neither its learning rate nor its beta: the defaults are those of `train dpo`.
"""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from diffusion_align.vocabulary import BETA_CONVENTIONS, DISCOUNTS, PAIR_NORMS

from ..schema import option
from ..verb import Verb
from .common import NetworkBatch, TrainOffline, check_data, check_train
from .metric_names import PAIRS

METRICS = (*PAIRS, "pair_weight")


@dataclass(frozen=True)
class TrainRankdpo(TrainOffline):
    # fmt: off
    output_dir: str = option("runs/rankdpo", "output", "the run folder", path="folder")
    train_data_dir: str | None = option(None, "data", "rankings on disk (or pairs, as rankings of two): a folder or a file", aliases=("data",), one_of="source", path="name")
    dataset_name: str | None = option(None, "data", "rankings by name: a path, a data set on the hub, or tiny", one_of="source", path="name")
    max_train_samples: int | None = option(None, "data", "use only the first N rankings", at_least=1)

    train_batch_size: int = option(4, "train", "prompts in a micro-batch, on each device, with all their pictures", at_least=1)
    num_train_epochs: int = option(1, "train", "epochs over the rankings, if max_train_steps is not given", at_least=1, one_of="length")
    beta_dpo: float = option(2500.0, "train", "strength of the pull towards the reference, in the unit of beta_convention", aliases=("beta",), above=0)
    beta_convention: str = option("diffusers", "train", "unit of beta_dpo: diffusers (mean over dims), salesforce (mean over dims, and a factor of 1/2, so its 5000 is 2500 of diffusers) or sum (over dims)", choices=BETA_CONVENTIONS)
    pair_norm: str = option("sum", "train", "the pairs of a prompt are added up (sum, the paper), averaged by weight (sum_weights) or divided by their number (num_pairs)", choices=PAIR_NORMS)
    discount: str = option("ln", "train", "logarithm of the rank discount, which the paper does not specify; log2 makes all weights 0.69 times as large", choices=DISCOUNTS)
    shared_noise: bool = option(False, "train", "one noise for all pictures of a prompt, as in train dpo; the paper draws one for each")
    one_picture_at_a_time: bool = option(False, "machine", "keep the network's activations for one picture of each prompt at a time: the same gradient with 1/K of the memory and 1.5 times the evaluations")
    # fmt: on

    @property
    def network_batch(self) -> NetworkBatch:
        return NetworkBatch(
            "train_batch_size", self.train_batch_size, "prompts", 1 if self.one_picture_at_a_time else 2
        )


def notes_train_rankdpo(options: TrainRankdpo, given: Collection[str]) -> list[str]:
    """One line if the unit of beta_dpo may be unexpected. `given`: the options that the user set."""
    if "beta_dpo" in given and "beta_convention" not in given:
        return [
            f"beta_dpo {options.beta_dpo:g} is in the unit of diffusers' script (mean over dims, no 1/2); "
            "a number from the code of Diffusion-DPO's authors needs --beta_convention salesforce"
        ]
    return []


def check_train_rankdpo(options: TrainRankdpo) -> None:
    """Check the options together.

    Raises:
        UsageError: no model, no rankings or two sources of them, or options that contradict each other.
    """
    check_train(options, METRICS)
    check_data(options, "rankings", " (tiny: the embedded ones)")


VERB = Verb(
    "train rankdpo",
    TrainRankdpo,
    check_train_rankdpo,
    "RankDPO: learn from rankings of several pictures, by how much each pair matters to the ranking.",
    method="rankdpo",
    notes=notes_train_rankdpo,
)
