"""Trajectories of the sampler for online training, in chunks: drawn by address, scored, and evaluated under the
reference.

A chunk holds complete groups: the K trajectories of prompt g are rows g K .. g K + K - 1. Drawing and learning use the
same chunks, so the network sees the same batches in both and the importance ratio is exactly 1.
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
"""`text [B,L,E] -> denoiser`: a model with its guidance, as a function of the prompt."""

Score = Callable[[Tensor, list[str]], Tensor]
"""`(final latents [B,...], prompts) -> [B]`: decode and reward."""


def once_a_group(bind: Bind, text: Tensor, group: int) -> Denoiser:
    """The denoiser of G groups of K rows, text [G,L,E]; evaluated once per group while its K states are equal.

    They are equal until the trajectories of a prompt get different noise: at the first step if they share the initial
    noise, and up to the first noise of a window.
    """
    several, one = bind(text.repeat_interleave(group, 0)), bind(text)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        first = x[::group]
        if group > 1 and torch.equal(x, first.repeat_interleave(group, 0)):
            return one(first, t[::group]).repeat_interleave(group, 0)
        return several(x, t)

    return denoise


def binder(predict: Predict, schedule: Schedule, prediction_type: str, empty_text: Tensor, guidance: float) -> Bind:
    """A network as `Bind`: the same guidance in rollout, log-probs and training."""
    return lambda text: guided_denoiser(predict, text, empty_text, guidance, schedule, prediction_type)


@dataclass(frozen=True, eq=False)
class Runs:
    """A chunk of G groups of K trajectories, B = G K rows.

    text: [G,L,E]. reference: [T,B,...] clean predictions of the reference along the trajectories, 0 at steps that are
    not scored. reward: [G,K]; nan if it failed.
    """

    trajectory: Trajectory[StepTable]
    text: Tensor
    reference: Tensor
    reward: Tensor
    prompts: list[str]

    @property
    def dims(self) -> int:
        """D, the latent dims of a trajectory."""
        return self.trajectory.states[0, 0].numel()

    def to(self, device: torch.device | str) -> "Runs":
        """The same trajectories with states, predictions and text on this device; rewards stay on the CPU."""
        run = self.trajectory
        there = {name: getattr(run, name).to(device) for name in ("states", "log_prob", "clean")}
        moved = {name: getattr(self, name).to(device) for name in ("text", "reference")}
        return replace(self, trajectory=replace(run, **there), **moved)

    def split(self, times: int) -> list["Runs"]:
        """Split into `times` chunks of complete groups, or one per group if there are fewer."""
        groups, size = self.reward.shape
        length = -(-groups // times)
        return [self._of(slice(i, i + length), size) for i in range(0, groups, length)] if length < groups else [self]

    def _of(self, groups: slice, size: int) -> "Runs":
        rows, run = slice(groups.start * size, groups.stop * size), self.trajectory
        trajectory = replace(
            run,
            states=run.states[:, rows],
            log_prob=run.log_prob[:, rows],
            clean=None if run.clean is None else run.clean[:, rows],
        )
        return Runs(trajectory, self.text[groups], self.reference[:, rows], self.reward[groups], self.prompts[groups])

    def under(self, bind: Bind) -> Denoiser:
        """A model's denoiser of the B rows."""
        return once_a_group(bind, self.text, self.reward.shape[1])

    def gaussian(self, k: int, clean: Tensor) -> Gaussian:
        """The Gaussian of step k along the trajectories, from stored predictions [T,B,...] of any model."""
        table, x = self.trajectory.table, widen(self.trajectory.states[k])
        return Gaussian(*step_gaussian(table, k, x, clean[k], *earlier(table, k, clean)))


def decided(runs: Runs) -> Tensor:
    """[G] bool: the groups with a preference. A group with a failed reward (nan) has none."""
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
    """Draw `group` trajectories for each prompt, and evaluate the reference along them. `scored` adds rewards.

    The noise of a trajectory has the address (seed, "run", epoch, prompt, k), its start (seed, "x_T", epoch, prompt,
    k), or without k if the group shares it (as in D3PO; PRDP's optimum requires it). `learn_steps`: learn from this
    many first steps only; the others are drawn, but neither scored nor evaluated by the reference. reference None: the
    reference is the policy that drew the trajectories, which costs no evaluation.
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
    """The same trajectories with the rewards of their final latents. Raises RewardError as `checked`."""
    rows = [prompt for prompt in runs.prompts for _ in range(runs.reward.shape[1])]
    reward = checked(score, runs.trajectory.states[-1], rows)
    return replace(runs, reward=reward.view(runs.reward.shape))


def _first_steps(table: StepTable, count: int) -> StepTable:
    """The table as if only its first steps had a density."""
    return replace(table, stochastic=table.stochastic & (torch.arange(len(table)) < count))


def _along(denoiser: Denoiser, run: Trajectory[StepTable], elsewhere: Tensor) -> Tensor:
    """Clean predictions [T,B,...] at the states that the scored steps of a trajectory use, and `elsewhere` at the
    others."""
    needed = scored_predictions(run, "recompute")
    found = {k: predict(denoiser, run.table, k, run.states[k]) for k in needed}
    return torch.stack([found.get(k, elsewhere[k]) for k in range(len(run.table))])


@torch.no_grad()
def repredict(runs: Runs, unmoved: bool, *, policy: Bind, reference: Bind | None) -> tuple[Runs, float]:
    """The same trajectories with predictions repeated in a batch of this shape, because other shapes round differently;
    and by how much those of the policy changed, relative as in `path_gradient`. States, noise and rewards stay the
    same.

    unmoved: the policy is still the one that drew the trajectories; otherwise its predictions are kept. reference None:
    the reference is the policy that drew the trajectories.
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
    """[B] float32 scores on the CPU; nan for scores or latents that are not finite.

    Raises RewardError, in one line, if the reward raises, returns another shape, or gives no finite number for any
    picture with finite latents.
    """
    try:
        values = score(latents, prompts)
    except Exception as error:
        if ran_out(error):
            raise  # no fault of the reward: the caller retries with fewer pictures
        raise RewardError(f"the reward failed: {type(error).__name__}: {error}") from error
    values = one_each(values, len(prompts), "the reward")
    pictures = latents.flatten(1).isfinite().all(1).cpu()
    values = torch.where(values.isfinite() & pictures, values, torch.nan)
    if bool(pictures.any()) and bool(values.isnan().all()):
        raise RewardError(f"the reward returned no finite number for any of {len(prompts)} pictures")
    return values
