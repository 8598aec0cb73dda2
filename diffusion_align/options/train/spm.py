"""The options of `reward train-spm`. Defaults are those of SPO's authors for Stable Diffusion 1.5, without their data."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from diffusion_align.rewards.spec import RewardSpec
from diffusion_align.vocabulary import LR_SCHEDULES, WITH_WARMUP

from ..names import UsageError
from ..reward import check_reward
from ..schema import option
from ..verb import Verb
from .common import GivenPictures, TrainCommon, check_data, check_train
from .metric_names import ALWAYS

METRICS = (*ALWAYS, "accuracy", "margin")


@dataclass(frozen=True)
class TrainSpm(GivenPictures, TrainCommon):
    # fmt: off
    reward: str = option("tiny", "reward", "CLIP reward to start from: tiny (the embedded one), a folder in open_clip's format, or an open_clip name", path="reward")
    inputs: str = option("pictures", "reward", "input of the model: pictures (decoded predictions), or latents (no decoder; its patches are fitted to those of the reward)", choices=("pictures", "latents"))
    guidance: float = option(5.0, "reward", "classifier-free guidance of the base's predictions; use the value of the later train spo", aliases=("guidance_scale",), at_least=0)

    relabel: str | None = option(None, "labels", "reward that replaces the labels of the data, by its scores of the clean pictures: a name of `diffusion-align reward ls`, or one of its forms (the authors take pickscore for SDXL)", path="reward")
    tie_margin: float = option(0.1, "labels", "with relabel: a tie if the softmax probabilities of the two scores differ by at most this (0.1: the authors' for SDXL)", at_least=0, below=1)
    keep_ties: bool = option(False, "labels", "keep pairs that are ties in the data: their label is 0.5, or that of relabel")

    max_train_samples: int | None = option(None, "data", "use only the first N pairs, including the held-out ones", at_least=1)
    held_out: int = option(100, "data", "smallest number of held-out pairs, which measure accuracy; all pairs of a prompt are held out together", at_least=0)

    train_batch_size: int = option(16, "train", "pairs in a micro-batch, on each device", at_least=1)
    learning_rate: float = option(3e-6, "train", "learning rate after warm-up (the authors have 1e-6 for SDXL)", aliases=("lr", "unet_lr"), above=0)
    lr_scheduler: str = option("linear", "train", "learning-rate schedule", choices=(*LR_SCHEDULES, WITH_WARMUP))
    adam_weight_decay: float = option(0.3, "train", "AdamW's weight decay", at_least=0)

    mixed_precision: str = option("no", "machine", "precision of the networks; the weights stay in float32", choices=("no", "fp16", "bf16"))

    output_dir: str = option("runs/spm", "output", "the run folder: the model, accuracy.json, metrics.jsonl", path="folder")
    # fmt: on

    @cached_property
    def relabel_spec(self) -> RewardSpec | None:
        """Raises UsageError if `relabel` is not a reward."""
        return None if self.relabel is None else check_reward(self.relabel)


def check_train_spm(options: TrainSpm) -> None:
    """Check the options together.

    Raises:
        UsageError: no model, no pairs or two sources of them, pairs that are all held out, or no such reward.
    """
    check_train(options, METRICS)
    check_data(options)
    if options.max_train_samples is not None and options.held_out >= options.max_train_samples:
        raise UsageError(
            f"data.held_out {options.held_out} leaves none of {options.max_train_samples} pairs to train on"
        )
    if options.relabel is not None:
        if options.relabel == "people":
            raise UsageError("reward people chooses between pictures of a run: it cannot relabel pairs")
        if options.relabel_spec is not None and options.relabel_spec.standardise:
            raise UsageError("labels.relabel std: compares pictures of one call only; name rewards without std:")


def notes_train_spm(options: TrainSpm, given: Collection[str]) -> list[str]:
    """One line for a tie_margin without relabel."""
    unused = "tie_margin" in given and options.relabel is None
    return ["tie_margin has no effect without relabel: the labels are the data's"] if unused else []


VERB = Verb(
    "reward train-spm",
    TrainSpm,
    check_train_spm,
    "Step-aware preference model of SPO: a CLIP reward that knows the noise level.",
    method="step_aware",
    notes=notes_train_spm,
)
