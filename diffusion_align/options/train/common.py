"""The options that training verbs share, with the names and defaults of known scripts (diffusers' DPO script first).

If a default differs from that script, the help says so. Numbers from papers are in presets, with unit and source.
"""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass

from diffusion_align.vocabulary import (
    LONG_PROMPTS,
    LORA_MODES,
    LR_SCHEDULES,
    MODES,
    PREDICTION_TYPES,
    PROMPT_SYNTAXES,
    WITH_WARMUP,
)

from ..data import COLUMNS, ENCODING, columns_fault, encoding_fault
from ..lora import GivenLora, NewLora, check_lora, targets_fault
from ..names import DEVICE, UsageError, device_fault
from ..prompt_reading import CHUNKS, LONG, SKIP, SYNTAX
from ..schema import option
from .metric_names import check_metric

NO_UPLOAD = "nothing is uploaded; the run folder is what to upload"


@dataclass(frozen=True)
class TrainCommon:
    """Options of every training."""

    # fmt: off
    pretrained_model_name_or_path: str | None = option(None, "model", "folder or hub id in diffusers format, single file (.safetensors), or tiny (the embedded model)", aliases=("model",), path="name")
    revision: str | None = option(None, "model", "branch, tag or commit on the hub")
    variant: str | None = option(None, "model", "variant of the weights' files, such as fp16")
    pretrained_vae_model_name_or_path: str | None = option(None, "model", "another VAE: its file, its folder, the folder of a model that has it, or a hub id", path="name")
    prediction_type: str | None = option(None, "model", "what the network predicts, where its files do not tell it or are wrong (default: as they say)", choices=PREDICTION_TYPES)

    resolution: int | str | None = option(None, "data", "side of the pictures in pixels, or width x height as in 768x512 (default: the model's own)", at_least=8)
    long_prompts: str = option("truncate", "text", LONG, choices=LONG_PROMPTS)
    prompt_chunks: int = option(3, "text", CHUNKS, at_least=1)
    prompt_syntax: str = option("plain", "text", SYNTAX, choices=PROMPT_SYNTAXES)
    clip_skip: int = option(1, "text", SKIP, at_least=1)

    cache_dir: str | None = option(None, "data", "folder for downloads and encoded pictures (default: the hub's cache, and output_dir/cache)", path="folder")

    seed: int = option(0, "train", "seed of every random number", at_least=0)
    max_train_steps: int | None = option(None, "train", "optimizer steps; overrides num_train_epochs", at_least=1, one_of="length")
    learning_rate: float = option(5e-4, "train", "learning rate after warm-up", aliases=("lr", "unet_lr"), above=0)
    scale_lr: bool = option(False, "train", "multiply the learning rate by the effective batch size")
    lr_scheduler: str = option("constant", "train", "learning-rate schedule", choices=(*LR_SCHEDULES, WITH_WARMUP))
    lr_warmup_steps: int | None = option(None, "train", "warm-up steps (default: 500, but at most a tenth of the run; constant has none)", at_least=0)
    lr_num_cycles: int = option(1, "train", "restarts of cosine_with_restarts", at_least=1)
    lr_power: float = option(1.0, "train", "power of polynomial", above=0)
    adam_beta1: float = option(0.9, "train", "AdamW's beta 1", at_least=0, below=1)
    adam_beta2: float = option(0.999, "train", "AdamW's beta 2", at_least=0, below=1)
    adam_weight_decay: float = option(1e-2, "train", "AdamW's weight decay", at_least=0)
    adam_epsilon: float = option(1e-8, "train", "AdamW's epsilon", above=0)
    max_grad_norm: float = option(1.0, "train", "gradients are clipped to this norm", above=0)
    skip_spikes: float | None = option(None, "train", "skip steps whose gradient norm is more than this many standard deviations above the mean of the last 128 good steps (default: skip none)", above=0)
    use_8bit_adam: bool = option(False, "train", "AdamW in 8 bits; needs the extra [8bit]")

    device: str | None = option(None, "machine", DEVICE, fault=device_fault)
    threads: int | None = option(None, "machine", "CPU threads (default: OMP_NUM_THREADS, else one for each core that other programs leave free)", at_least=1)
    mixed_precision: str = option("no", "machine", "precision of the network", choices=("no", "fp16", "bf16"))
    allow_tf32: bool = option(False, "machine", "use TF32 in matrix products and convolutions on NVIDIA GPUs (default: in neither)")
    process_timeout: int = option(1800, "machine", "distributed timeout in seconds; must exceed the longest phase that only rank 0 runs (a sample grid, relabelling)", at_least=10)
    local_rank: int = option(-1, "machine", "set by old launchers", saved=False, unused="the rank is read from the environment")

    output_dir: str = option("runs/dpo", "output", "the run folder", path="folder")
    overwrite_output_dir: bool = option(False, "output", "delete the records of an earlier run in output_dir", saved=False)
    checkpointing_steps: int = option(500, "output", "steps between checkpoints", at_least=1)
    checkpoints_total_limit: int | None = option(None, "output", "newest checkpoints to keep (default: all)", at_least=1)
    keep_best: str | None = option(None, "output", "also keep the checkpoint with the highest mean of this metric since the previous checkpoint, such as reward_mean (-loss: the lowest)")
    resume_from_checkpoint: str | None = option(None, "output", "latest, auto (latest if there is one), a checkpoint of this run by name (step-00000300), or the path of a checkpoint or of a run", aliases=("resume",), saved=False, path="resume")
    extend: bool = option(False, "output", "resume with more steps than the run had planned; if the learning rate decays, its schedule then covers all of them", saved=False)
    report_to: str | None = option(None, "output", "trackers to report to beside metrics.jsonl: tensorboard, wandb, ... (several with commas), all, none")
    tracker_name: str | None = option(None, "output", "project name in a tracker", aliases=("tracker_project_name",))
    logging_dir: str | None = option(None, "output", "folder of trackers that write files, inside output_dir unless absolute (default: logs)", path="inside")
    # fmt: on


@dataclass(frozen=True)
class TrainUnet(GivenLora, TrainCommon):
    """Options of methods that train the UNet, or a LoRA on it."""

    # fmt: off
    mode: str = option("lora", "adapter", "train a LoRA, or the full UNet", choices=MODES)
    rank: int = option(4, "adapter", "rank of the LoRA", aliases=("network_dim",), at_least=1)
    network_alpha: float | None = option(None, "adapter", "strength of the LoRA: its output is scaled by alpha / rank (default: the rank)", aliases=("lora_alpha",), above=0)
    lora_targets: str = option("attention", "adapter", "layers that get a LoRA: attention (its projections), wide (also feed-forward layers and convolutions), or the ends of layers' names with commas between them (attention,conv_in)", fault=targets_fault)
    use_dora: bool = option(False, "adapter", "train a DoRA: a LoRA, and a magnitude for each output of a layer")
    use_rslora: bool = option(False, "adapter", "scale the LoRA's output by alpha / sqrt(rank), as rsLoRA does; the file is a plain LoRA of that strength")
    lora_mode: str = option("continue", "adapter", "what the training makes of --lora: continue (train it further, with its rank and layers), beneath (freeze it under a new LoRA; the file holds both), merge (into the model's weights; the file holds the new LoRA only). The reference is the model with --lora in all of them", choices=LORA_MODES)

    collapse_alarm: str = option("warn", "train", "if preferred pictures get worse, or the pictures of a prompt too similar: warn, stop (after a checkpoint) or off", choices=("warn", "stop", "off"))
    collapse_winner_error: float = option(0.01, "train", "raise the alarm if the error on preferred pictures exceeds the reference's by more than this, mean over dims", above=0)
    collapse_diversity: float = option(0.5, "train", "raise the alarm if the pictures of a prompt differ by less than this fraction of their difference at the start", at_least=0, at_most=1)
    collapse_patience: int = option(20, "train", "number of steps that the alarm averages over", at_least=1)
    use_ema: bool = option(False, "train", "keep an exponential moving average of the weights, and export it")
    ema_decay: float = option(0.999, "train", "decay of that average; smaller in the first steps", at_least=0, below=1)

    gradient_checkpointing: bool = option(False, "machine", "recompute activations in the backward pass: less memory, slower")
    enable_xformers_memory_efficient_attention: bool = option(False, "machine", "attention by xformers, on CUDA; torch's own is as fast")
    prior_generation_precision: str | None = option(None, "machine", "a leftover of DreamBooth scripts", choices=("no", "fp32", "fp16", "bf16"), unused="no prior is generated")

    run_validation: bool | None = option(None, "validation", "sample grids: true, also every validation_steps; false, none (default: of the base model at the start, and at the end)")
    validation_steps: int = option(200, "validation", "steps between sample grids", at_least=1)
    validation_prompts: tuple[str, ...] = option((), "validation", "prompt of the sample grids; may be repeated (default: the first of the data)", aliases=("validation_prompt",))
    validation_guidance: float = option(7.5, "validation", "guidance of the sample grids", at_least=0)
    validation_sampling_steps: int = option(25, "validation", "sampler steps of the sample grids", at_least=1)

    push_to_hub: bool = option(False, "hub", "upload the result", unused=NO_UPLOAD)
    hub_model_id: str | None = option(None, "hub", "repository to upload to", unused=NO_UPLOAD)
    hub_token: str | None = option(None, "hub", "token to upload with", saved=False, unused=NO_UPLOAD)
    # fmt: on

    @property
    def new_lora(self) -> NewLora | None:
        """The LoRA that the training adds; None with --mode full and if it continues one."""
        continues = self.lora is not None and self.lora_mode == "continue"
        return None if self.mode == "full" or continues else NewLora.of(self)


@dataclass(frozen=True)
class NetworkBatch:
    """What is in the network at once: the option that says so, its count, what it counts, and network rows of each."""

    option: str
    count: int
    unit: str
    rows: int


@dataclass(frozen=True)
class GivenPictures:
    """Options of methods that learn from given pictures."""

    # fmt: off
    train_data_dir: str | None = option(None, "data", "pairs on disk: a folder or a file", aliases=("data",), one_of="source", path="name")
    dataset_name: str | None = option(None, "data", "pairs by name: a path, a data set on the hub, or tiny", one_of="source", path="name")
    dataset_split_name: str | None = option(None, "data", "split of a data set (default: train)", aliases=("split",))
    max_train_samples: int | None = option(None, "data", "use only the first N pairs", at_least=1)
    max_bad_fraction: float = option(0.01, "data", "largest fraction of bad rows; these are left out and listed; with more, the run stops", at_least=0, at_most=1)
    columns: tuple[str, ...] = option((), "data", COLUMNS, fault=columns_fault)
    encoding: str | None = option(None, "data", ENCODING, fault=encoding_fault)
    cache_limit_gb: float | None = option(None, "data", "largest size in GB of all encoded sets in the cache's folder; before a new set is encoded, those that were not used for longest are removed, never one that a process uses (default: no limit)", above=0)
    encode_precision: str = option("no", "data", "precision in which pictures and prompts are encoded (no: float32); they are kept in float32", choices=("no", "fp16", "bf16"))

    train_batch_size: int = option(4, "train", "pairs in a micro-batch, on each device", at_least=1)
    gradient_accumulation_steps: int | None = option(None, "train", "micro-batches summed into one step on each device (default: 1, or what effective_batch_size asks for)", at_least=1, one_of="accumulation")
    effective_batch_size: int | None = option(None, "train", "pairs in one optimizer step, over all devices: the accumulation follows from it", at_least=1, one_of="accumulation")
    num_train_epochs: int = option(1, "train", "epochs over the pairs, if max_train_steps is not given", at_least=1, one_of="length")
    # fmt: on

    @property
    def network_batch(self) -> NetworkBatch:
        return NetworkBatch("train_batch_size", self.train_batch_size, "pairs", 2)


@dataclass(frozen=True)
class TrainOffline(GivenPictures, TrainUnet):
    """Options of methods that train the UNet on given pictures."""

    # fmt: off
    dataset_config_name: str | None = option(None, "data", "configuration of a data set on the hub (default: the set's own)")
    proportion_empty_prompts: float = option(0.0, "data", "fraction of prompts replaced by the empty one", at_least=0, at_most=1)
    vae_encode_batch_size: int = option(8, "data", "pictures encoded at a time", at_least=1, unused="the cache encodes as many at a time as are new among 16 pairs, in chunks of 16")
    aspect_buckets: bool = option(False, "data", "crop each pair to a shape that is near its pictures' own, in place of a square; a micro-batch holds one shape", aliases=("enable_bucket",))
    bucket_step: int | None = option(None, "data", "with aspect_buckets: sides are multiples of this many pixels (default: 64, or what the model needs for small pictures)", aliases=("bucket_reso_steps",), at_least=1)
    random_crop: bool = option(False, "data", "crop at random places, in place of the middle; both pictures of a pair alike")
    center_crop: bool | None = option(None, "data", "true: crop in the middle; false: at random places, as random_crop (default: in the middle unless random_crop is given)")
    crop_variants: int = option(4, "data", "with random crops: crops of each picture that are encoded and kept; each use takes one of them", at_least=1)
    random_flip: bool = option(False, "data", "also keep the mirror image of each crop; each use takes one of the two, both pictures of a pair alike", aliases=("flip_aug",))
    size_conditioning: str = option("latents", "data", "what SDXL is told as a picture's size: that of its latents, uncropped (as the authors of Diffusion-DPO do), or the picture's own size and crop", choices=("latents", "pictures"))
    no_hflip: bool = option(False, "data", "do not flip pictures", unused="pictures are flipped with --random_flip only")
    dataloader_num_workers: int = option(0, "data", "processes that load data", at_least=0, unused="batches come from the cache; there is nothing to load")
    # fmt: on

    @property
    def crops_at_random(self) -> bool:
        return self.random_crop or self.center_crop is False


def check_train(options: TrainCommon, metrics: tuple[str, ...]) -> None:
    """Checks of several options together, for every method. `metrics`: those that the method writes.

    Raises:
        UsageError: options that contradict each other, or no model.
    """
    if options.pretrained_model_name_or_path is None:
        raise UsageError("which model? --pretrained_model_name_or_path FOLDER, a hub id, or tiny")
    if options.resume_from_checkpoint is not None and options.overwrite_output_dir:
        raise UsageError("--overwrite_output_dir deletes what --resume_from_checkpoint continues: give one of them")
    if options.extend and options.resume_from_checkpoint is None:
        raise UsageError("--extend lengthens a resumed run: give --resume_from_checkpoint as well")
    if options.mixed_precision == "fp16" and options.device == "cpu":
        raise UsageError("machine.mixed_precision fp16 needs a GPU; use bf16 or no on a CPU")
    check_metric(options.keep_best, metrics)
    if isinstance(options, TrainUnet):
        _check_adapter(options)
    if isinstance(options, TrainOffline):
        _check_crops(options)


def _check_adapter(o: TrainUnet) -> None:
    check_lora(o)
    if o.lora is not None and o.mode == "full" and o.lora_mode != "merge":
        raise UsageError(
            "--mode full trains all weights, so --lora can only be merged into them: give --lora_mode merge"
        )
    if o.mode == "full" and (o.use_dora or o.use_rslora):
        raise UsageError("--use_dora and --use_rslora are for --mode lora")
    if o.use_dora and o.lora is not None and o.lora_mode == "beneath":
        raise UsageError(
            "a DoRA cannot be joined with the LoRA beneath it in one file: leave out --use_dora, or --lora_mode merge"
        )


def _check_crops(options: TrainOffline) -> None:
    """Raise UsageError for options of crops that contradict each other, or that nothing uses."""
    if options.random_crop and options.center_crop:
        raise UsageError("--center_crop crops in the middle, --random_crop at random places: give one of them")
    if options.random_flip and options.no_hflip:
        raise UsageError("--random_flip keeps mirror images, --no_hflip has none: give one of them")
    if options.bucket_step is not None and not options.aspect_buckets:
        raise UsageError("--bucket_step is the step of --aspect_buckets: give both, or neither")


def check_data(options: GivenPictures, what: str = "pairs", cure: str = "") -> None:
    """Raise UsageError unless there is exactly one source of data."""
    if options.train_data_dir is None and options.dataset_name is None:
        raise UsageError(f"which {what}? --train_data_dir PATH or --dataset_name NAME{cure}")
    if options.train_data_dir is not None and options.dataset_name is not None:
        raise UsageError(f"two sources of {what}: give --train_data_dir or --dataset_name, not both")
