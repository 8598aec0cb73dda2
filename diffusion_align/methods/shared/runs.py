"""Runs of the sampler for online training: drawn by address, scored, and set beside the reference, in chunks.

A chunk holds whole groups: the K runs of a prompt are rows g K .. g K + K - 1. It is also what is learnt from in one
piece, so that the network sees the same batches in both and the importance ratio is 1 to the bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.gaussian import Gaussian
from diffusion_align.models.guidance import Predict, guided_denoiser
from diffusion_align.prediction import Denoiser
from diffusion_align.rewards import RewardError, one_each
from diffusion_align.samplers import StepTable, rollout, step_gaussian
from diffusion_align.samplers.rollout import earlier, predict, scored_predictions
from diffusion_align.samplers.two_pass import relative_change
from diffusion_align.schedule import Schedule
from diffusion_align.system.memory import ran_out
from diffusion_align.tensors import widen
from diffusion_align.train.method import Sample
from diffusion_align.trajectory import Trajectory

Bind = Callable[[Tensor], Denoiser]
"""`text [B,L,E] -> denoiser`: a model with its guidance, waiting for a prompt."""

Score = Callable[[Tensor, list[str]], Tensor]
"""`(final latents [B,...], prompts) -> [B]`: decode and reward, composed by the script."""


def once_a_group(bind: Bind, text: Tensor, group: int) -> Denoiser:
    """The denoiser of G groups of K rows, text [G,L,E]; asked once a group where its K states are one state.

    That is so until the runs of a prompt part: at the first step where they share their start, and up to the first
    noise in a window.
    """
    several, one = bind(text.repeat_interleave(group, 0)), bind(text)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        first = x[::group]
        if group > 1 and torch.equal(x, first.repeat_interleave(group, 0)):
            return one(first, t[::group]).repeat_interleave(group, 0)
        return several(x, t)

    return denoise


def binder(predict: Predict, schedule: Schedule, prediction_type: str, empty_text: Tensor, guidance: float) -> Bind:
    """A network as `Bind`: one guidance, alike in rollout, log-probs and training."""
    return lambda text: guided_denoiser(predict, text, empty_text, guidance, schedule, prediction_type)


@dataclass(frozen=True, eq=False)
class Runs:
    """A chunk of G groups of K runs, B = G K rows.

    text: [G,L,E]. reference: [T,B,...] the reference's clean predictions along the runs, 0 where no scored step uses
    them. reward: [G,K]; nan where a reward failed.
    """

    trajectory: Trajectory[StepTable]
    text: Tensor
    reference: Tensor
    reward: Tensor
    prompts: list[str]

    @property
    def dims(self) -> int:
        """D, the latent dims of a run."""
        return self.trajectory.states[0, 0].numel()

    def to(self, device: torch.device | str) -> "Runs":
        """The same runs with their states, predictions and text elsewhere; rewards stay on the CPU."""
        run = self.trajectory
        there = {name: getattr(run, name).to(device) for name in ("states", "log_prob", "clean")}
        moved = {name: getattr(self, name).to(device) for name in ("text", "reference")}
        return replace(self, trajectory=replace(run, **there), **moved)

    def split(self, times: int) -> list["Runs"]:
        """So many parts of whole groups, or one of each group."""
        groups, size = self.reward.shape
        length = -(-groups // times)
        return [self._part(slice(i, i + length), size) for i in range(0, groups, length)] if length < groups else [self]

    def _part(self, groups: slice, size: int) -> "Runs":
        rows, run = slice(groups.start * size, groups.stop * size), self.trajectory
        part = replace(
            run,
            states=run.states[:, rows],
            log_prob=run.log_prob[:, rows],
            clean=None if run.clean is None else run.clean[:, rows],
        )
        return Runs(part, self.text[groups], self.reference[:, rows], self.reward[groups], self.prompts[groups])

    def under(self, bind: Bind) -> Denoiser:
        """A model's denoiser of the B rows."""
        return once_a_group(bind, self.text, self.reward.shape[1])

    def gaussian(self, k: int, clean: Tensor) -> Gaussian:
        """The Gaussian of step k along the runs, from stored predictions [T,B,...] of any model."""
        table, x = self.trajectory.table, widen(self.trajectory.states[k])
        return Gaussian(*step_gaussian(table, k, x, clean[k], *earlier(table, k, clean)))


def decided(runs: Runs) -> Tensor:
    """[G] bool: the groups with a preference. One in which a reward failed has none, as a nan is equal to nothing."""
    return runs.reward.amax(1) > runs.reward.amin(1)


@dataclass(frozen=True, eq=False)
class Prompted:
    """G prompts, their text [G,L,E], and the samples (epoch, index) that address what is drawn for them."""

    prompts: list[str]
    text: Tensor
    samples: Sequence[Sample]


@torch.no_grad()
def draw_runs(
    policy: Bind,
    reference: Bind | None,
    table: StepTable,
    prompted: Prompted,
    *,
    group: int,
    share_noise: bool,
    shape: Sequence[int],
    seed: int,
    learn_steps: int | None = None,
) -> Runs:
    """Run the policy `group` times for each prompt, and evaluate the reference along the runs. `scored` adds rewards.

    The noise of a run is at the address (seed, "run", epoch, prompt, k), its start at (seed, "x_T", epoch, prompt, k)
    or, shared by the group as D3PO has it and PRDP's optimum needs it, without the k. `learn_steps` keeps only the
    first so many steps for learning: the others are walked, but neither scored nor asked of the reference. Without a
    reference it is the policy that ran: renewed every round, it costs nothing.
    """
    text, samples = prompted.text, prompted.samples
    rows = [(*sample, k) for sample in samples for k in range(group)]
    starts = [row[:2] if share_noise else row for row in rows]
    x_T = rng.normal_batch(shape, seed, "x_T", starts).to(text.device)
    run = rollout(once_a_group(policy, text, group), table, x_T, [rng.generator(seed, "run", *row) for row in rows])
    if learn_steps is not None:
        run = replace(run, table=_first_steps(table, learn_steps))
    assert run.clean is not None  # rollouts keep them
    nothing = torch.zeros_like(run.clean)
    other = run.clean if reference is None else _along(once_a_group(reference, text, group), run, nothing)
    return Runs(run, text, other, torch.full((len(samples), group), torch.nan), prompted.prompts)


def scored(runs: Runs, score: Score) -> Runs:
    """The same runs with the rewards of where they end. Raises RewardError as `checked` does."""
    rows = [prompt for prompt in runs.prompts for _ in range(runs.reward.shape[1])]
    reward = checked(score, runs.trajectory.states[-1], rows)
    return replace(runs, reward=reward.view(runs.reward.shape))


def _first_steps(table: StepTable, count: int) -> StepTable:
    """The table as if only its first steps had a density."""
    return replace(table, stochastic=table.stochastic & (torch.arange(len(table)) < count))


def _along(denoiser: Denoiser, run: Trajectory[StepTable], elsewhere: Tensor) -> Tensor:
    """Clean predictions [T,B,...] at the states of a run that its scored steps use, and `elsewhere` those given."""
    needed = scored_predictions(run, "recompute")
    found = {k: predict(denoiser, run.table, k, run.states[k]) for k in needed}
    return torch.stack([found.get(k, elsewhere[k]) for k in range(len(run.table))])


@torch.no_grad()
def repredict(runs: Runs, unmoved: bool, *, policy: Bind, reference: Bind | None) -> tuple[Runs, float]:
    """The same runs with their predictions made anew in a batch of this shape, as a larger one rounds differently; and
    by how much those of the policy have changed, relative as in `path_gradient`.

    Without `unmoved` the policy is no longer the one that ran, whose predictions then stay as they are. Without a
    reference it is the policy that ran. States, noise and rewards stay.
    """
    run, group, change = runs.trajectory, runs.reward.shape[1], 0.0
    assert run.clean is not None  # rollouts keep them
    clean, other = run.clean, runs.reference
    if unmoved:
        clean = _along(once_a_group(policy, runs.text, group), run, run.clean)
        steps = scored_predictions(run, "recompute")
        change = max(relative_change(run.table, k, run.states[k], run.clean[k], clean[k]) for k in steps)
    if reference is not None:
        other = _along(once_a_group(reference, runs.text, group), run, runs.reference)
    elif unmoved:
        other = clean
    return replace(runs, trajectory=replace(run, clean=clean), reference=other), change


def checked(score: Score, latents: Tensor, prompts: list[str]) -> Tensor:
    """[B] float32 scores on the CPU; what is not finite becomes nan and is left out by whoever selects.

    Latents that are not finite have no score, for no picture of theirs shows it. Raises RewardError, in one line, when
    the reward raises, answers with another shape, or has no finite number for any picture that is one.
    """
    try:
        values = score(latents, prompts)
    except Exception as error:
        if ran_out(error):
            raise  # which is no fault of the reward: fewer pictures at a time may do
        raise RewardError(f"the reward failed: {type(error).__name__}: {error}") from error
    values = one_each(values, len(prompts), "the reward")
    pictures = latents.flatten(1).isfinite().all(1).cpu()
    values = torch.where(values.isfinite() & pictures, values, torch.nan)
    if bool(pictures.any()) and bool(values.isnan().all()):
        raise RewardError(f"the reward returned no finite number for any of {len(prompts)} pictures")
    return values
