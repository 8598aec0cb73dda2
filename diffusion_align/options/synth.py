"""The options of `data synth`."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from diffusion_align.rewards.spec import RewardSpec
from diffusion_align.vocabulary import SOLVERS, SPACINGS

from .names import DEVICE, UsageError, device_fault, shard_of
from .reward import check_reward
from .schema import option


@dataclass(frozen=True)
class Synth:
    # fmt: off
    models: tuple[str, ...] = option((), "model", "model to draw with: folder or hub id in diffusers format, tiny, or a run folder (its base with the trained weights); may be repeated", aliases=("model",), path="name")

    prompts: str | None = option(None, "data", "file with one prompt per line, or tiny (captions of the embedded world's training split)", aliases=("prompts_file",), path="name")
    num_prompts: int | None = option(None, "data", "use the first N prompts (default: all; of tiny, 800)", at_least=1)
    pictures: int = option(4, "data", "pictures of each prompt, over all models, which take turns", aliases=("num_images_per_prompt",), at_least=2)

    rewards: tuple[str, ...] = option((), "reward", "scorer: a name of `diffusion-align reward ls`, or one of its forms; may be repeated", aliases=("reward",), path="reward")
    random_labels: bool = option(False, "reward", "control experiment: the relevances of each prompt's pictures are shuffled; files are named random_*")

    steps: int = option(25, "sampler", "steps", aliases=("num_inference_steps",), at_least=1)
    guidance: float = option(7.5, "sampler", "classifier-free guidance; 1 is none", aliases=("guidance_scale",), at_least=0)
    seed: int = option(0, "sampler", "address of picture i of a model: (seed, prompt, position of the model in --models, i)", at_least=0)
    solver: str = option("dpmpp", "sampler", "DPM-Solver++ or DDIM", choices=SOLVERS)
    order: int = option(2, "sampler", "order of DPM-Solver++", at_least=1, at_most=3)
    eta: float = option(0.0, "sampler", "0: without noise, 1: the stochastic solver", at_least=0)
    spacing: str = option("trailing", "sampler", "spacing of the steps", choices=SPACINGS)
    resolution: int | str | None = option(None, "sampler", "side of the pictures in pixels, or width x height as in 768x512 (default: each model's own)", at_least=8)

    shard: str | None = option(None, "machine", "K/N: draw and score every N-th chunk of prompts, K from 0 to N - 1; all shards write into one folder, and the last to finish writes the tables", saved=False)
    batch_size: int = option(16, "machine", "pictures at a time", at_least=1)
    device: str | None = option(None, "machine", DEVICE, fault=device_fault)
    threads: int | None = option(None, "machine", "CPU threads (default: OMP_NUM_THREADS, else one for each core that other programs leave free)", at_least=1)
    mixed_precision: str = option("no", "machine", "precision of the network", choices=("no", "fp16", "bf16"))
    out: str = option("synth", "output", "folder for pictures, scores, rankings.parquet, pairs.parquet and report.json", aliases=("output_dir",), path="folder")
    # fmt: on

    @cached_property
    def reward_specs(self) -> dict[str, RewardSpec]:
        """The rewards by their texts; raises UsageError if one is not a reward."""
        return {name: check_reward(name) for name in self.rewards}


def check_synth(options: Synth) -> None:
    """Check the options together.

    Raises:
        UsageError: no models, prompts or rewards, or options that contradict each other.
    """
    o = options
    if not o.models:
        raise UsageError("which models? --models NAME (may be repeated): a folder, a hub id, a run folder, or tiny")
    if o.prompts is None:
        raise UsageError("which prompts? --prompts FILE with one per line, or tiny")
    if not o.rewards and not o.random_labels:
        raise UsageError("which rewards? --rewards NAME (may be repeated), or --random_labels for a control")
    if len(set(o.rewards)) < len(o.rewards) or len(set(o.models)) < len(o.models):
        raise UsageError("a model or a reward is named twice")
    if o.pictures < len(o.models):
        raise UsageError(f"data.pictures {o.pictures} is less than one picture for each of {len(o.models)} models")
    if o.order == 3 and o.eta > 0:
        raise UsageError("sampler.order 3 is for sampler.eta 0 only")
    if o.solver == "ddim" and o.eta > 1:
        raise UsageError(f"sampler.eta of ddim is at most 1, not {o.eta:g}")
    _ = o.reward_specs
    shard_of(o.shard)
