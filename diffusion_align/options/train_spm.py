"""The options of `reward train-spm`. Defaults are those of SPO's authors for Stable Diffusion 1.5, without their data."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from diffusion_align.rewards.spec import read_spec

from .device import DEVICE, device_fault
from .names import UsageError
from .reward import check_reward
from .schema import option


@dataclass(frozen=True)
class TrainSpm:
    # fmt: off
    pretrained_model_name_or_path: str | None = option(None, "model", "base whose predictions are judged: folder or hub id in diffusers format, or tiny", aliases=("model",), path="name")
    revision: str | None = option(None, "model", "branch, tag or commit on the hub")
    variant: str | None = option(None, "model", "variant of the weights' files, such as fp16")

    reward: str = option("tiny", "reward", "CLIP reward to start from: tiny (the embedded one), a folder in open_clip's format, or an open_clip name", path="reward")
    inputs: str = option("pictures", "reward", "what it reads: pictures (decoded predictions), or latents (no decoder; patches fitted to the reward's)", choices=("pictures", "latents"))
    guidance: float = option(5.0, "reward", "classifier-free guidance of the base's predictions; use that of the runs to come", aliases=("guidance_scale",), at_least=0)

    relabel: str | None = option(None, "labels", "reward that says anew which picture of a pair is better, on the clean pictures, in place of the data: a name of `diffusion-align reward ls`, or one of its forms (the authors take pickscore for SDXL)", path="reward")
    tie_margin: float = option(0.1, "labels", "with relabel: a tie where the softmax of the two scores differs by no more (0.1: the authors' for SDXL)", at_least=0, below=1)
    keep_ties: bool = option(False, "labels", "keep pairs that the data calls even: their label is a half, or what relabel says")

    train_data_dir: str | None = option(None, "data", "pairs on disk: a folder or a file", aliases=("data",), one_of="source", path="name")
    dataset_name: str | None = option(None, "data", "pairs by name: a path, a data set on the hub, or tiny", one_of="source", path="name")
    dataset_split_name: str | None = option(None, "data", "split of a data set (default: train)", aliases=("split",))
    max_train_samples: int | None = option(None, "data", "use only the first N pairs, held-out ones among them", at_least=1)
    held_out: int = option(100, "data", "pairs, at least, that are kept from training to measure accuracy; whole prompts", at_least=0)
    max_bad_fraction: float = option(0.01, "data", "share of broken rows that is left out and listed; with more the run stops", at_least=0, at_most=1)
    encode_precision: str = option("no", "data", "precision in which pictures and prompts are encoded (no: float32); they are kept in float32", choices=("no", "fp16", "bf16"))
    resolution: int | None = option(None, "data", "side of the pictures in pixels (default: the model's own)", at_least=8)
    cache_dir: str | None = option(None, "data", "where downloads and encoded pictures are kept (default: the hub's own place, and output_dir/cache)", path="folder")

    seed: int = option(0, "train", "every draw is keyed by it", at_least=0)
    train_batch_size: int = option(16, "train", "pairs per device and step of accumulation", at_least=1)
    gradient_accumulation_steps: int = option(1, "train", "batches summed into one step", at_least=1)
    num_train_epochs: int = option(1, "train", "passes over the pairs, where max_train_steps is not given", at_least=1, one_of="length")
    max_train_steps: int | None = option(None, "train", "steps of the optimizer; overrides num_train_epochs", at_least=1, one_of="length")
    learning_rate: float = option(3e-6, "train", "learning rate after warm-up (the authors have 1e-6 for SDXL)", aliases=("lr",), above=0)
    lr_scheduler: str = option("linear", "train", "course of the learning rate", choices=("constant", "linear", "cosine"))
    lr_warmup_steps: int | None = option(None, "train", "steps of warm-up (default: 500, but at most a tenth of the run; constant has none)", at_least=0)
    adam_weight_decay: float = option(0.3, "train", "AdamW's weight decay", at_least=0)
    max_grad_norm: float = option(1.0, "train", "gradients are clipped to this norm", above=0)

    device: str | None = option(None, "machine", DEVICE, fault=device_fault)
    threads: int | None = option(None, "machine", "CPU threads (default: OMP_NUM_THREADS, else one for each core that other programs leave free)", at_least=1)
    mixed_precision: str = option("no", "machine", "precision of the networks; the weights stay in float32", choices=("no", "fp16", "bf16"))
    process_timeout: int = option(1800, "machine", "with several processes: seconds they wait for one that does not come; more than the longest that one alone is busy (a grid, a reward)", at_least=10)

    output_dir: str = option("runs/spm", "output", "folder for the model, accuracy.json and metrics.jsonl", path="folder")
    overwrite_output_dir: bool = option(False, "output", "replace an earlier model in output_dir", saved=False)
    # fmt: on


def check_train_spm(options: TrainSpm) -> None:
    """What no single option can know.

    Raises:
        UsageError: no model, no pairs or two sources of them, pairs that are all held out, or no such reward.
    """
    if options.pretrained_model_name_or_path is None:
        raise UsageError("which model? --pretrained_model_name_or_path FOLDER, a hub id, or tiny")
    if options.train_data_dir is None and options.dataset_name is None:
        raise UsageError("which pairs? --train_data_dir PATH or --dataset_name NAME")
    if options.train_data_dir is not None and options.dataset_name is not None:
        raise UsageError("two sources of pairs: give --train_data_dir or --dataset_name, not both")
    if options.max_train_samples is not None and options.held_out >= options.max_train_samples:
        raise UsageError(
            f"data.held_out {options.held_out} leaves none of {options.max_train_samples} pairs to train on"
        )
    if options.relabel is not None:
        if options.relabel == "people":
            raise UsageError("reward people chooses between pictures of a run: it cannot relabel pairs")
        check_reward(options.relabel)
        if read_spec(options.relabel).standardise:
            raise UsageError("labels.relabel std: compares pictures of one call only; name rewards without std:")
    if options.mixed_precision == "fp16" and options.device == "cpu":
        raise UsageError("machine.mixed_precision fp16 needs a GPU; take bf16 or no on a CPU")


def notes_train_spm(options: TrainSpm, given: Collection[str]) -> list[str]:
    """One line for a margin that nothing is held against."""
    unused = "tie_margin" in given and options.relabel is None
    return ["tie_margin has no effect without relabel: the labels are the data's"] if unused else []
