"""The options of `reward score` and `reward serve`, and the early check of every `--reward`."""

# ruff: noqa: E501  (a table: one option a line)
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from diffusion_align.rewards.spec import RewardSpec, UnknownReward, read_spec

from .names import DEVICE, UsageError, device_fault
from .schema import option

REWARD = "a name of `diffusion-align reward ls`, one of its forms, or several: 0.5:pickscore,0.5:hpsv2.1"


class WithReward:
    """Options with a field `reward`; its text is parsed once."""

    reward: str | None

    @cached_property
    def reward_spec(self) -> RewardSpec:
        """Raises UsageError if `reward` is missing or is not a reward."""
        if self.reward is None:
            raise UsageError("which reward? --reward NAME: `diffusion-align reward ls` lists them")
        return check_reward(self.reward)


@dataclass(frozen=True)
class RewardScore(WithReward):
    # fmt: off
    reward: str | None = option(None, "reward", REWARD, path="reward")
    seed: int = option(0, "reward", "seed of the reward random", at_least=0)

    images: tuple[str, ...] = option((), "data", "a picture, or a folder of pictures (scored in order of their names); may be repeated", path="in")
    prompts_file: str | None = option(None, "data", "file with one prompt per line, one for each picture or one for all (default: those of samples.json in the folder, or of metadata.jsonl in GenEval's layout; jpeg-*, aesthetic and random need none)", aliases=("prompts",), path="name")

    batch_size: int = option(16, "machine", "pictures at a time", at_least=1)
    device: str | None = option(None, "machine", DEVICE, fault=device_fault)
    out: str = option("scores.jsonl", "output", "file with one line per picture: its name, its prompt and its score", path="file")
    # fmt: on


@dataclass(frozen=True)
class RewardServe(WithReward):
    # fmt: off
    reward: str | None = option(None, "reward", REWARD, path="reward")
    seed: int = option(0, "reward", "seed of the reward random", at_least=0)

    port: int = option(8000, "server", "port", at_least=1, at_most=65535)
    host: str = option("127.0.0.1", "server", "address to listen on; all except loopback addresses need a token in DIFFUSION_ALIGN_REWARD_TOKEN")
    max_pictures: int = option(64, "server", "most pictures in one request", at_least=1, at_most=1024)
    max_side: int = option(2048, "server", "longest side of a picture, in pixels", at_least=8, at_most=8192)
    max_megabytes: int = option(64, "server", "largest size of one request, in MB", at_least=1, at_most=1024)

    device: str | None = option(None, "machine", DEVICE, fault=device_fault)
    # fmt: on


def check_reward(text: str) -> RewardSpec:
    """Parse a reward's text before anything is loaded.

    Raises:
        UsageError: not a reward, with the nearest name; or a path that does not exist.
    """
    try:
        return read_spec(text)
    except UnknownReward as error:
        raise UsageError(f"{error}; `diffusion-align reward ls` lists the names") from error
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error


def check_reward_score(options: RewardScore) -> None:
    """Raise UsageError for no reward, one that does not exist, or no pictures."""
    check_reward_serve(options)
    if not options.images:
        raise UsageError("which pictures? --images FOLDER or FILE (may be repeated)")


def check_reward_serve(options: RewardScore | RewardServe) -> None:
    """Raise UsageError for no reward, or one that does not exist."""
    if options.reward_spec.parts[0].kind == "people":
        raise UsageError("reward people compares the pictures of a prompt: it is for train d3po, prdp and ddpo")
