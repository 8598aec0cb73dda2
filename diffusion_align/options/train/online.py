"""The options that online methods share: prompts, rollouts and rewards.

Defaults are those of the papers if they give one, in their units: log-ratios averaged over dims.
"""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from diffusion_align.vocabulary import FINALS, IN_NOISE, SOLVERS, SPACINGS

from ..names import UsageError
from ..reward import WithReward
from ..schema import option
from .common import NetworkBatch, TrainUnet, check_train

UNITS = "unit of beta and clip: mean (log-ratios averaged over dims, as published) or nats (summed)"


@dataclass(frozen=True)
class TrainOnline(WithReward, TrainUnet):
    # fmt: off
    prompts: str | None = option(None, "data", "file with one prompt per line, the name of a list (animals, spo-4k, hpdv2-train and more: assets/prompts/README.md), or tiny (captions of the embedded world's training split)", aliases=("prompts_file",), path="name")
    num_prompts: int | None = option(None, "data", "use the first N prompts (default: all; of tiny, 4000)", at_least=1)

    solver: str = option("ddim", "rollout", "sampler that draws trajectories: ddim, or dpmpp (SDE-DPM-Solver++)", choices=SOLVERS)
    order: int = option(2, "rollout", "order of dpmpp", at_least=1, at_most=2)
    eta: float = option(1.0, "rollout", "amount of noise; above 0, because a log-probability needs noise", above=0)
    steps: int = option(20, "rollout", "steps of a trajectory", aliases=("num_inference_steps",), at_least=2)
    spacing: str = option("trailing", "rollout", "spacing of the steps", choices=SPACINGS)
    final: str = option("zero", "rollout", "where a trajectory ends: zero (at noise level zero: the last step has no noise and is not learned from), or sigma_min (at the noise level of t = 0, as diffusers' DDIM with set_alpha_to_one false: the last step has noise and is learned from)", choices=FINALS)
    guidance: float = option(5.0, "rollout", "classifier-free guidance in rollout, log-probabilities and training; 1 is none", aliases=("guidance_scale",), at_least=0)
    prompts_per_round: int = option(16, "rollout", "prompts of a round, over all devices; the policy that draws them stays the same", at_least=1)
    group_size: int = option(2, "rollout", "pictures of each prompt", at_least=2)
    learn_steps: int | None = option(None, "rollout", "learn only from the first N steps of a trajectory (default: all steps with noise); not for spo", at_least=1, one_of="learned")
    noise_window: int | None = option(None, "rollout", "noise and learning only in a window of N steps, whose place is drawn for each round; the other steps are without noise (default: noise in all). spo compares in the window only", at_least=1, one_of="learned")
    window_first: int = option(0, "rollout", "first step at which a noise_window may start", at_least=0)
    window_last: int | None = option(None, "rollout", "last step at which a noise_window may start (default: the window then ends with the last step that has noise)", at_least=0)
    sample_chunk: int = option(16, "rollout", "pictures in the network at a time, in rollout and training; it determines the memory", at_least=1)
    share_initial_noise: bool = option(True, "rollout", "the pictures of a prompt start from the same noise")

    reward: str | None = option(None, "reward", "a name of `diffusion-align reward ls`, one of its forms, or several: 0.5:pickscore,0.5:hpsv2.1. people: you choose in a browser page on this machine while the run waits", path="reward")

    prompts_per_step: int | None = option(None, "train", "prompts of an optimizer step, over all devices (default: all of a round)", at_least=1, one_of="step")
    passes: int = option(1, "train", "how often the pictures of a round are learned from", aliases=("num_inner_epochs",), at_least=1)
    checkpointing_steps: int = option(50, "output", "steps between checkpoints; each is written at the end of a round", at_least=1)
    num_rounds: int = option(100, "train", "rounds, if max_train_steps is not given", at_least=1, one_of="length")
    # fmt: on
    pictures_option: ClassVar[str] = "group_size"

    @property
    def pictures_per_prompt(self) -> int:
        """Pictures of a prompt that are in the network together."""
        return getattr(self, self.pictures_option)

    @property
    def network_batch(self) -> NetworkBatch:
        pictures = min(self.sample_chunk, self.prompts_per_round * self.pictures_per_prompt)
        return NetworkBatch("sample_chunk", pictures, "pictures", 1 if self.guidance == 1 else 2)


def check_online(options: TrainOnline, metrics: tuple[str, ...]) -> None:
    """Check the options together. `metrics`: those that the method writes.

    Raises:
        UsageError: no prompts or reward, or numbers that do not fit together.
    """
    o = options
    check_train(o, metrics)
    if o.prompts is None:
        raise UsageError("which prompts? --prompts FILE with one per line, or tiny")
    if o.solver == "ddim" and o.eta > 1:
        raise UsageError(f"rollout.eta of ddim is at most 1, not {o.eta:g}")
    if o.reward is None and getattr(o, "preference_model", None) is None:
        raise UsageError(
            "which reward? --reward NAME: tiny, an open_clip name with its weights, judge, people or random"
        )
    if o.reward is not None:
        _ = o.reward_spec  # raises if it is not a reward
    per_step = o.prompts_per_step or o.prompts_per_round
    if o.prompts_per_round % per_step:
        raise UsageError(
            f"rollout.prompts_per_round {o.prompts_per_round} is not a multiple of train.prompts_per_step {per_step}"
        )
    if o.learn_steps is not None and o.learn_steps >= o.steps:
        raise UsageError(f"rollout.learn_steps {o.learn_steps} must be fewer than rollout.steps {o.steps}")
    _check_window(o)
    if o.sample_chunk < o.pictures_per_prompt:
        pictures = f"the {o.pictures_per_prompt} pictures of a prompt ({o.pictures_option})"
        raise UsageError(f"rollout.sample_chunk {o.sample_chunk} must hold {pictures}")


def noisy_steps(options: TrainOnline) -> int:
    """How many steps of a trajectory have noise, as far as the options tell: all, except a last step to noise level zero.

    Some grids already end at t = 0: with `sigma_min` their last step would be empty, and the table has one step less.
    That is also so for a leading grid of a model without steps_offset, which only the table shows.
    """
    o = options
    reaches = o.spacing in IN_NOISE or (o.spacing == "linspace" and o.solver == "ddim")
    return o.steps - 1 if o.final == "zero" or reaches else o.steps


def window_starts(options: TrainOnline, noisy: int | None = None) -> range:
    """The steps at which a noise window may start. `noisy`: the number of steps with noise, if the table is known."""
    last = (noisy_steps(options) if noisy is None else noisy) - (options.noise_window or 1)
    return range(options.window_first, min(last, last if options.window_last is None else options.window_last) + 1)


def _check_window(o: TrainOnline) -> None:
    if o.noise_window is None:
        return
    if o.learn_steps is not None:
        raise UsageError("rollout.noise_window and rollout.learn_steps each say which steps to learn from: give one")
    latest = noisy_steps(o) - o.noise_window
    if not window_starts(o) or (o.window_last or 0) > latest:
        last = f" .. {o.window_last}" if o.window_last is not None else ""
        raise UsageError(
            f"a window of {o.noise_window} of {o.steps} steps starts at one of 0 .. {latest}, "
            f"not at {o.window_first}{last} (rollout.window_first, window_last)"
        )


def notes_online(options: TrainOnline, given: Collection[str]) -> list[str]:
    """One line for each option of a noise window if there is none."""
    return [
        f"{name} has no effect without noise_window"
        for name in ("window_first", "window_last")
        if name in given and options.noise_window is None
    ]
