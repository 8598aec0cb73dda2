"""The options that online methods share: prompts, rollouts and rewards.

Defaults are the papers' where there is one, in the papers' units: log-ratios averaged over the latent's dims.
"""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from diffusion_align.sampler_names import SOLVERS

from ..names import UsageError
from ..reward import WithReward
from ..schema import option
from .common import TrainUnet, check_train

UNITS = "unit of beta and clip: mean (log-ratios averaged over dims, as published) or nats (summed)"


@dataclass(frozen=True)
class TrainOnline(WithReward, TrainUnet):
    # fmt: off
    prompts: str | None = option(None, "data", "file with one prompt a line, the name of a list (animals, spo-4k, hpdv2-train and more: assets/prompts/README.md), or tiny (captions of the embedded world's training split)", aliases=("prompts_file",), path="name")
    num_prompts: int | None = option(None, "data", "use the first N prompts (default: all; of tiny, 4000)", at_least=1)

    solver: str = option("ddim", "rollout", "sampler of the runs: ddim, or dpmpp (SDE-DPM-Solver++)", choices=SOLVERS)
    order: int = option(2, "rollout", "order of dpmpp", at_least=1, at_most=2)
    eta: float = option(1.0, "rollout", "noise dial; log-probs need some", above=0)
    steps: int = option(20, "rollout", "steps of a run", aliases=("num_inference_steps",), at_least=2)
    spacing: str = option("trailing", "rollout", "where the steps lie", choices=("trailing", "leading", "linspace", "karras", "lu", "exponential", "ays"))
    final: str = option("zero", "rollout", "where a run ends: zero (noise-free, so its last step has no noise and is not learnt from), or sigma_min (at the noise level of t = 0, as diffusers' DDIM with set_alpha_to_one false: the last step has noise and is learnt from)", choices=("zero", "sigma_min"))
    guidance: float = option(5.0, "rollout", "classifier-free guidance in rollout, log-probs and training alike; 1 is none", aliases=("guidance_scale",), at_least=0)
    prompts_per_round: int = option(16, "rollout", "prompts of a round, over all devices: drawn with one policy", at_least=1)
    group_size: int = option(2, "rollout", "pictures of each prompt", at_least=2)
    learn_steps: int | None = option(None, "rollout", "learn from the first N steps of a run only (default: all with a density); not for spo", at_least=1, one_of="learnt")
    noise_window: int | None = option(None, "rollout", "noise, and learning, in N steps of a run only, a window drawn anew each round; the others are noise-free (default: noise in all). spo compares in the window only", at_least=1, one_of="learnt")
    window_first: int = option(0, "rollout", "first step at which a noise_window may start", at_least=0)
    window_last: int | None = option(None, "rollout", "last step at which it may start (default: where it ends with the last step that has noise)", at_least=0)
    sample_chunk: int = option(16, "rollout", "pictures in the network at a time, in rollout and training; memory follows it", at_least=1)
    share_initial_noise: bool = option(True, "rollout", "the pictures of a prompt start from the same noise")

    reward: str | None = option(None, "reward", "a name of `diffusion-align reward ls`, one of its forms, or several: 0.5:pickscore,0.5:hpsv2.1. people: you choose, in a page on this machine, while the run waits", path="reward")

    prompts_per_step: int | None = option(None, "train", "prompts of an optimizer step, over all devices (default: those of a round)", at_least=1, one_of="step")
    passes: int = option(1, "train", "times that a round's pictures are learnt from", aliases=("num_inner_epochs",), at_least=1)
    checkpointing_steps: int = option(50, "output", "steps between checkpoints; each is written at the end of a round", at_least=1)
    num_rounds: int = option(100, "train", "rounds, where max_train_steps is not given", at_least=1, one_of="length")
    # fmt: on


def check_online(options: TrainOnline, metrics: tuple[str, ...], pictures: str = "group_size") -> None:
    """What no single option can know. `pictures`: the option that says how many of a prompt are drawn together.

    Raises:
        UsageError: no prompts, or numbers that cannot be cut as asked.
    """
    o = options
    check_train(o, metrics)
    if o.prompts is None:
        raise UsageError("which prompts? --prompts FILE with one a line, or tiny")
    if o.solver == "ddim" and o.eta > 1:
        raise UsageError(f"rollout.eta of ddim is at most 1, not {o.eta:g}")
    if o.reward is None and getattr(o, "preference_model", None) is None:
        raise UsageError(
            "which reward? --reward NAME: tiny, an open_clip name with its weights, judge, people or random"
        )
    if o.reward is not None:
        _ = o.reward_spec  # raises where it is none
    per_step = o.prompts_per_step or o.prompts_per_round
    if o.prompts_per_round % per_step:
        raise UsageError(
            f"rollout.prompts_per_round {o.prompts_per_round} is not a multiple of train.prompts_per_step {per_step}"
        )
    if o.learn_steps is not None and o.learn_steps >= o.steps:
        raise UsageError(f"rollout.learn_steps {o.learn_steps} must be fewer than rollout.steps {o.steps}")
    _check_window(o)
    if o.sample_chunk < getattr(o, pictures):
        raise UsageError(
            f"rollout.sample_chunk {o.sample_chunk} must hold the {getattr(o, pictures)} pictures of a prompt ({pictures})"
        )


def noisy_steps(options: TrainOnline) -> int:
    """How many of a run's steps have noise, as far as the options tell: all but a last one to a noise-free end.

    Three grids reach t = 0 by themselves: there `sigma_min` leaves the last step nothing to do, and the table of the
    run has one step less. So has a leading one of a model without steps_offset, which only its table knows.
    """
    o = options
    reaches = o.spacing in ("karras", "lu", "exponential") or (o.spacing == "linspace" and o.solver == "ddim")
    return o.steps - 1 if o.final == "zero" or reaches else o.steps


def window_starts(options: TrainOnline, noisy: int | None = None) -> range:
    """The steps at which a noise window may start. `noisy`: steps with noise, where the table of the run is known."""
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
    """One line for a place of a window that there is not."""
    return [
        f"{name} has no effect without noise_window"
        for name in ("window_first", "window_last")
        if name in given and options.noise_window is None
    ]
