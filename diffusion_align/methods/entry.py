"""What a training command asks of a method: one `Entry` in the method's file says everything.

The command reads the data, opens the model, prints the plan and follows the loop; the entry fills in what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from torch.nn import Parameter

from diffusion_align.schedule import Schedule
from diffusion_align.train.run import Run, StepRecord

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusion_align.data import PairCache
    from diffusion_align.data.bad_rows import BadRow
    from diffusion_align.methods.shared.noising import Networks
    from diffusion_align.models import TextToImage
    from diffusion_align.rewards import Reward
    from diffusion_align.rewards.spec import RewardSpec

Options = TypeVar("Options")


@dataclass(frozen=True)
class About:
    """What a plan is counted from; known before the model is loaded.

    shape: of the latents, [C,h,w]. items: pairs, rankings or prompts; None while they are on the hub. count: how many
    of them are trained on; None while unknown. processes: of this job.
    """

    schedule: Schedule
    shape: tuple[int, int, int]
    items: Sequence[Any] | None
    count: int | None
    processes: int

    @property
    def dims(self) -> int:
        """D, the latent dims."""
        return prod(self.shape)


@dataclass(frozen=True)
class Length:
    """How long a run is, and its lines of the plan.

    steps: of the optimizer, in all; None while the data are not counted. batch: what one step takes, over all
    processes; `--scale_lr` multiplies by it. accumulation: micro-batches of a step on each process. sizes: how an
    online method cuts its rounds. evaluations: of the network in the whole run, of an online method. identity: what of
    it a resumed run must have in common with the saved one.
    """

    steps: int | None
    batch: int
    lines: list[str]
    accumulation: int = 1
    sizes: Any = None
    evaluations: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)

    def with_lines(self, lines: list[str]) -> Length:
        return replace(self, lines=lines)


@dataclass(frozen=True)
class Opened:
    """A run whose model is loaded.

    networks: the policy as it trains, and its reference. items, bad_rows: as they were read. folder: the run's.
    encode: (pairs or rankings, rows that could not be read) -> their cache. reward: what a text means -> the reward.
    """

    model: TextToImage
    networks: Networks
    accelerator: Accelerator
    shape: tuple[int, int, int]
    items: list[Any]
    bad_rows: Sequence[BadRow]
    folder: Path
    encode: Callable[[Sequence[Any], Sequence[BadRow]], PairCache]
    reward: Callable[[RewardSpec], Reward]


@dataclass(frozen=True)
class Trained:
    """Weights that a run trains: by name, in the optimizer's order, and how they are written into a folder.

    `write` returns the file or folder it wrote. With `pictures` the model draws sample grids while it is trained.
    """

    named: dict[str, Parameter]
    write: Callable[[Path], Path]
    pictures: bool = True


@dataclass(frozen=True)
class Started:
    """A method with its data.

    count: items that are trained on. identity: what of data and constants a resumed run must have in common with the
    saved one, beside the options. loop: the engine at work. trained: what is trained where it is not the UNet.
    report: called on the main process when the loop has ended, with the number of steps.
    """

    count: int
    identity: dict[str, Any]
    loop: Callable[[Run, Length], Iterator[StepRecord]]
    trained: Trained | None = None
    report: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Entry(Generic[Options]):
    """A method as its command sees it.

    verb: the words of the command. data: what it reads. shown: metrics on the progress bar.
    length: how long the run is. constants: lines of the plan about the loss. start: data and model -> the loop.
    require: refuses, before the model is loaded, what the options' own checks cannot know. count: how many of the
    items it trains on, before any turns out to be unreadable. needs_reference: whether the loss
    compares with the frozen model; unet: whether the UNet is what is trained.
    """

    verb: str
    data: Literal["pairs", "rankings", "prompts"]
    shown: tuple[str, ...]
    length: Callable[[Options, About], Length]
    constants: Callable[[Options, About], list[str]]
    start: Callable[[Options, Opened], Started]
    require: Callable[[Options], None] = lambda o: None
    count: Callable[[Options, Sequence[Any]], int] = lambda o, items: len(items)
    needs_reference: Callable[[Options], bool] = lambda o: True
    unet: bool = True
