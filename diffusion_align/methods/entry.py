"""The interface between the training command and a method: one `Entry` in the file of the method.

The command reads the data, loads the model, prints the plan and runs the loop; the entry provides what differs between
methods.
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
    """What a plan is computed from; known before the model is loaded.

    shape: of the latents, [C,h,w]. items: pairs, rankings or prompts; None if they are not downloaded. count: how many
    of them are trained on; None if unknown. processes: number of processes of this job.
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
    """How long a run is, and the lines about that in the plan.

    steps: optimizer steps of the run; None if the data are not counted. batch: items of one step, over all processes;
    the option scale_lr multiplies by it. accumulation: micro-batches of a step on each process. sizes: the `RoundSizes`
    of an online method. evaluations: network evaluations of the run (online methods). identity: values that must be
    the same when the run is resumed.
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

    networks: the trained policy and its reference. items, bad_rows: as read. folder: of the run. encode: (pairs or
    rankings, rows that could not be read) -> their cache. reward: parsed text of a reward -> the reward.
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
    """The weights that a run trains: by name, in the order of the optimizer.

    write: writes them into a folder and returns the file or folder that it made. pictures: whether they change what
    the model draws, so that sample grids are drawn during training.
    """

    named: dict[str, Parameter]
    write: Callable[[Path], Path]
    pictures: bool = True


@dataclass(frozen=True)
class Started:
    """A method with its data.

    count: items that are trained on. identity: values, beside the options, that must be the same when the run is
    resumed. loop: runs the engine. trained: what is trained, if it is not the UNet. report: called on the main process
    after the loop, with the number of steps.
    """

    count: int
    identity: dict[str, Any]
    loop: Callable[[Run, Length], Iterator[StepRecord]]
    trained: Trained | None = None
    report: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Entry(Generic[Options]):
    """What the training command knows of a method.

    verb: the words of the command. data: the kind of items. shown: metrics on the progress bar. length: how long the
    run is. constants: lines of the plan about the loss. start: data and model -> the loop. require: raises, before the
    model is loaded, for errors that the checks of the options cannot find. count: how many items it trains on if all
    are readable. needs_reference: whether the loss compares with the frozen model. unet: whether it trains the UNet.
    chunks: of an online method, the classes of what it draws, which a checkpoint inside a round contains.
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
    chunks: tuple[type, ...] = ()
