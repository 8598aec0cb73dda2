"""The options of `sample` and `evaluate`."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from diffusion_align.rewards.spec import RewardSpec
from diffusion_align.vocabulary import LONG_PROMPTS, PREDICTION_TYPES, PROMPT_SYNTAXES, SOLVERS, SPACINGS

from .lora import GivenLora, check_lora
from .names import DEVICE, UsageError, device_fault, shard_of
from .prompt_reading import AS_RUN, CHUNKS, LONG, SKIP, SYNTAX
from .reward import check_reward
from .schema import option


@dataclass(frozen=True)
class Sample(GivenLora):
    # fmt: off
    run: str | None = option(None, "model", "run folder whose trained weights are used", path="in")
    pretrained_model_name_or_path: str | None = option(None, "model", "folder or hub id in diffusers format, single file (.safetensors), or tiny (default: the run's base)", aliases=("model",), path="name")
    revision: str | None = option(None, "model", "branch, tag or commit on the hub")
    variant: str | None = option(None, "model", "variant of the weights' files, such as fp16")
    pretrained_vae_model_name_or_path: str | None = option(None, "model", "another VAE: its file, its folder, the folder of a model that has it, or a hub id (default: the run's)", path="name")
    prediction_type: str | None = option(None, "model", "what the network predicts, where its files do not tell it or are wrong (default: the run's)", choices=PREDICTION_TYPES)

    prompt: tuple[str, ...] = option((), "prompts", "a prompt; may be repeated")
    prompts_file: str | None = option(None, "prompts", "file with one prompt per line, or another list of prompts: a file, a folder, or a name such as parti, hpdv2 or dpg-bench (docs/evaluation.md)", aliases=("prompts",), path="name")
    num_prompts: int | None = option(None, "prompts", "use the first N prompts of that list", at_least=1)
    negative_prompt: str = option("", "prompts", "what guidance steers away from")
    num_images_per_prompt: int = option(1, "prompts", "pictures of each prompt", at_least=1)
    long_prompts: str | None = option(None, "prompts", LONG + AS_RUN, choices=LONG_PROMPTS)
    prompt_chunks: int | None = option(None, "prompts", CHUNKS + AS_RUN, at_least=1)
    prompt_syntax: str | None = option(None, "prompts", SYNTAX + AS_RUN, choices=PROMPT_SYNTAXES)
    clip_skip: int | None = option(None, "prompts", SKIP + AS_RUN, at_least=1)

    steps: int = option(25, "sampler", "steps", aliases=("num_inference_steps",), at_least=1)
    guidance: float = option(7.5, "sampler", "classifier-free guidance; 1 is none", aliases=("guidance_scale",), at_least=0)
    seed: int = option(0, "sampler", "picture i of a prompt has the noise of (seed, prompt's number, i)", at_least=0)
    solver: str = option("dpmpp", "sampler", "DPM-Solver++ or DDIM", choices=SOLVERS)
    order: int = option(2, "sampler", "order of DPM-Solver++", at_least=1, at_most=3)
    eta: float = option(0.0, "sampler", "0: without noise, 1: the stochastic solver", at_least=0)
    spacing: str = option("trailing", "sampler", "spacing of the steps", choices=SPACINGS)
    resolution: int | str | None = option(None, "sampler", "side of the pictures in pixels, or width x height as in 768x512 (default: as the run was trained, else the model's default)", at_least=8)

    batch_size: int = option(8, "machine", "pictures at a time", at_least=1)
    device: str | None = option(None, "machine", DEVICE, fault=device_fault)
    threads: int | None = option(None, "machine", "CPU threads (default: OMP_NUM_THREADS, else one for each core that other programs leave free)", at_least=1)
    mixed_precision: str = option("no", "machine", "precision of the network", choices=("no", "fp16", "bf16"))
    out: str = option("samples", "output", "folder for the pictures and samples.json", aliases=("output_dir",), path="folder")
    overwrite: bool = option(False, "output", "remove the pictures of an earlier command in that folder", saved=False)
    layout: str = option("samples", "output", "layout of the folder: samples (numbered, with samples.json), or what the scorers of GenEval, DPG-Bench or T2I-CompBench read; those continue an interrupted command", choices=("samples", "geneval", "dpg", "compbench"))
    from_pictures: str | None = option(None, "output", "draw nothing: arrange a folder in GenEval's layout, such as RUN/evaluation/tuned-KEY/dpmpp, as --layout dpg or compbench", path="in")
    # fmt: on


@dataclass(frozen=True)
class Evaluate(GivenLora):
    # fmt: off
    run: tuple[str, ...] = option((), "models", "run folders, checkpoints in them (RUN/checkpoints/step-...), LoRA files (with --model), or models by folder, file or hub id", path="name")
    pretrained_model_name_or_path: str | None = option(None, "models", "the model that the runs were trained from, if it is not the one in their configurations", aliases=("model",), path="name")
    pretrained_vae_model_name_or_path: str | None = option(None, "models", "another VAE for all models (default: the runs')", path="name")
    prediction_type: str | None = option(None, "models", "what all networks predict, where their files do not tell it or are wrong (default: the runs')", choices=PREDICTION_TYPES)
    base: str | None = option(None, "models", "the model they are compared with: a run, checkpoint or model (default: the base of the first run)", path="name")

    prompts: str = option("held-out", "prompts", "a list of prompts: a file or folder, a name (parti, geneval; hpdv2, drawbench, t2i-compbench, dpg-bench, which are fetched), or held-out (captions of the embedded world that no training set contains)", path="name")
    num_prompts: int = option(500, "prompts", "use the first N prompts", at_least=2)
    num_images_per_prompt: int = option(1, "prompts", "pictures of each prompt; diversity needs two", at_least=1)
    long_prompts: str | None = option(None, "prompts", LONG + AS_RUN, choices=LONG_PROMPTS)
    prompt_chunks: int | None = option(None, "prompts", CHUNKS + AS_RUN, at_least=1)
    prompt_syntax: str | None = option(None, "prompts", SYNTAX + AS_RUN, choices=PROMPT_SYNTAXES)
    clip_skip: int | None = option(None, "prompts", SKIP + AS_RUN, at_least=1)

    sampler: tuple[str, ...] = option(("dpmpp", "ddim"), "sampler", "dpmpp (DPM-Solver++ 2M), ddim, or both, because the sampler can reverse a ranking. The report starts with the first", choices=SOLVERS)
    steps: int = option(15, "sampler", "steps, trailing, for every model and sampler", aliases=("num_inference_steps",), at_least=1)
    guidance: float = option(4.0, "sampler", "classifier-free guidance; 1 is none", aliases=("guidance_scale",), at_least=0)
    seed: int = option(0, "sampler", "in every model prompt i starts from the noise of (seed, i)", at_least=0)
    resolution: int | str | None = option(None, "sampler", "side of all pictures in pixels, or width x height (default: as the runs were trained, else the model's default)", at_least=8)

    reward: str = option("auto", "score", "reward beside the judge, usually the one that was trained on: any of `diffusion-align reward ls`, none, or auto (tiny for captions of the embedded world, none for other prompts)", path="reward")
    held_out_reward: tuple[str, ...] = option((), "score", "further rewards that training did not use: a gain only in the trained reward is reward hacking", path="reward")
    features: str = option("tiny", "score", "network whose features measure diversity and distances: tiny, an open_clip name such as ViT-L-14-336:openai, or none", path="reward")
    reference_pictures: str | None = option(None, "score", "folder of real pictures to measure distances to (default: for the embedded world its renderings, else none)", path="in")
    pictures: int = option(24, "score", "pairs of pictures shown in the report", at_least=0)

    shard: str | None = option(None, "machine", "K/N: draw one of N shards of the prompts, K from 0 to N - 1; all shards fill one folder, and the last one to finish writes the report", saved=False)
    batch_size: int = option(64, "machine", "pictures at a time", at_least=1)
    device: str | None = option(None, "machine", DEVICE, fault=device_fault)
    threads: int | None = option(None, "machine", "CPU threads (default: OMP_NUM_THREADS, else one for each core that other programs leave free)", at_least=1)
    mixed_precision: str = option("no", "machine", "precision of the network", choices=("no", "fp16", "bf16"))
    output_dir: str | None = option(None, "output", "folder for pictures and report (default: for one run, its own folder; else evaluations/NAMES)", path="folder")
    # fmt: on

    @cached_property
    def reward_specs(self) -> dict[str, RewardSpec]:
        """The rewards by their texts, the trained one first; raises UsageError if one is not a reward."""
        return {name: check_reward(name) for name in rewards_of(self)}


def check_sample(options: Sample) -> None:
    """Check the options together.

    Raises:
        UsageError: no prompts, no model, or a layout that does not fit the other options.
    """
    if options.from_pictures is not None:
        return _check_arranging(options)
    check_lora(options)
    if options.run is None and options.pretrained_model_name_or_path is None:
        raise UsageError("which model? --pretrained_model_name_or_path NAME, --run FOLDER, or both")
    if not options.prompt and options.prompts_file is None:
        raise UsageError('which prompts? --prompt "..." (may be repeated) or --prompts_file FILE')
    if options.layout == "dpg" and options.num_images_per_prompt not in (1, 4):
        raise UsageError("output.layout dpg takes four pictures of a prompt, or one: --num_images_per_prompt 4")
    if options.overwrite and options.layout != "samples":
        raise UsageError(f"output.overwrite is for layout samples; for {options.layout} give a new --out")
    if options.order == 3 and options.eta > 0:
        raise UsageError("sampler.order 3 is for sampler.eta 0 only")


def _check_arranging(options: Sample) -> None:
    if options.layout not in ("dpg", "compbench"):
        raise UsageError("output.from_pictures is for --layout dpg or compbench")
    drawing = ("run", "lora", "pretrained_model_name_or_path", "prompt", "prompts_file")
    given = next((name for name in drawing if getattr(options, name)), None)
    if given is not None:
        raise UsageError(f"output.from_pictures draws nothing, so --{given} has no effect with it")


def check_evaluate(options: Evaluate) -> None:
    """Check the options together.

    Raises:
        UsageError: no run, something given twice, or no such shard.
    """
    check_lora(options)
    if not options.run:
        raise UsageError("which run? diffusion-align evaluate RUN_FOLDER ...")
    for what, given in (("run", options.run), ("sampler", options.sampler), ("reward", rewards_of(options))):
        if len(set(given)) < len(given):
            raise UsageError(f"{what} {max(given, key=list(given).count)!r} is given twice")
    shard_of(options.shard)


def rewards_of(options: Evaluate) -> tuple[str, ...]:
    """Names of the rewards, the trained one first."""
    return (() if options.reward in ("auto", "none") else (options.reward,)) + options.held_out_reward
