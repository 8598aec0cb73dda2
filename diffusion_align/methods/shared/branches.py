"""SPO's step-wise resampler (Liang et al. 2024, arXiv 2406.04314): pairs of children of one state.

From step `start` on, K children are drawn from the same Gaussian, and each is scored by its own clean prediction one
step later. The best and the worst make a pair if their scores differ enough (or all pairs that do are kept). A random
child is the next parent; its prediction is already known. With segments longer than one step (MSPO, for SDXL) each
child is continued separately, the comparison is made at the end of the segment, and every transition of the winner's
and of the loser's segment makes a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.gaussian import Gaussian
from diffusion_align.methods.shared.runs import Bind, Prompted, Score, checked
from diffusion_align.objectives import best_and_worst, clear_win, ordered_pairs
from diffusion_align.prediction import Denoiser
from diffusion_align.samplers import StepTable, branch, step_gaussian
from diffusion_align.samplers.rollout import draw_noise, predict
from diffusion_align.tensors import widen

StepScore = Callable[[Tensor, list[str], Tensor], Tensor]
"""`(clean predictions [B,...], prompts, timesteps [B]) -> [B]`: logits of a preference model (t = 0: finished)."""


@dataclass(frozen=True, eq=False)
class Comparisons:
    """M pairs of transitions of any prompts and steps.

    parent, child: [2,M,...] states before and after the step, of winner and loser; before: [2,M,...] the states before
    the parents, the history of second-order steps. k: [M] steps. text: [M,L,E]. gap: [M] winner's score minus loser's.
    family: [M] ascending numbers, equal for the pairs of one comparison and step. shared: whether the pairs of a family
    have one parent (true in segments of one step). score, kept: [S,B] of every comparison, the mean score of the
    children and whether it made pairs. final: [B,...] states of the chains after their last comparison.
    """

    before: Tensor
    parent: Tensor
    child: Tensor
    k: Tensor
    text: Tensor
    gap: Tensor
    family: Tensor
    shared: bool
    score: Tensor
    kept: Tensor
    final: Tensor

    def __len__(self) -> int:
        return len(self.k)

    def to(self, device: torch.device | str) -> Comparisons:
        """The same pairs with their tensors on this device."""
        names = ("before", "parent", "child", "k", "text", "gap", "family", "score", "kept", "final")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def split(self, times: int) -> list[Comparisons]:
        """Split into `times` chunks of complete families, or one per family if there are fewer."""
        _, sizes = self.family.cpu().unique_consecutive(return_counts=True)
        length = max(1, -(-len(sizes) // times))
        if length >= len(sizes):
            return [self]
        ends = [int(some.sum()) for some in sizes.split(length)]
        return [self.of(rows) for rows in torch.arange(len(self)).split(ends)]

    def of(self, rows: Tensor) -> Comparisons:
        """These pairs only."""
        states = {name: getattr(self, name)[:, rows] for name in ("before", "parent", "child")}
        return replace(self, **states, **{name: getattr(self, name)[rows] for name in ("k", "text", "gap", "family")})

    @property
    def dims(self) -> int:
        """D, the latent dims."""
        return self.final[0].numel()

    def by_prompt(self) -> Tensor:
        """The rows [M] sorted by prompt, then by step: an order that does not depend on the chunks."""
        prompts, family = len(self.final), self.family.cpu()
        return ((family % prompts) * (int(family.max()) + 1) + family).argsort(stable=True) if len(self) else family


@dataclass(frozen=True)
class Branching:
    """How SPO compares.

    children: of each state. start: the first step at which it compares. threshold: the least difference in probability
    of winner and loser. segment: steps between comparisons. all_pairs: all pairs of children instead of best and worst.
    lookahead: steps without noise that a child takes before it is scored.
    """

    children: int
    start: int
    threshold: float
    segment: int = 1
    all_pairs: bool = False
    lookahead: int = 0


@torch.no_grad()
def resample(
    policy: Bind,
    table: StepTable,
    prompted: Prompted,
    score: StepScore,
    how: Branching,
    *,
    shape: Sequence[int],
    seed: int,
    quiet: StepTable | None = None,
) -> Comparisons:
    """Walk one chain per prompt and compare at the end of each segment.

    It compares at the steps with noise from `how.start` on, so a table with a noise window compares in the window only.
    With `how.lookahead` each child is continued by that many steps of `quiet`, the table at eta = 0 (or to its end),
    and scored by the clean prediction there: a reward for finished pictures can then judge early steps.

    Network evaluations per prompt, for n steps with comparisons after s steps without: s + 1 + n K, and K for each step
    of a look-ahead, except a last step to a finished picture.

    Raises ValueError for fewer than 2 children, a start after which no step has noise, steps without noise between
    those with noise, or a look-ahead without `quiet`; RewardError as `checked`.
    """
    text, prompts, samples, children = prompted.text, prompted.prompts, prompted.samples, how.children
    if how.lookahead and quiet is None:
        raise ValueError("to look ahead, give the table without noise (quiet)")
    noisy = [k for k in range(how.start, len(table)) if table.stochastic[k]]
    if children < 2 or how.segment < 1 or not noisy:
        raise ValueError(
            f"SPO compares 2 or more children from step {how.start} on: {children} of a table of {len(table)}"
        )
    first, last = noisy[0], noisy[-1]
    if len(noisy) != last - first + 1:
        raise ValueError(f"SPO compares at steps in a row, not at {noisy}")
    sources = [rng.generator(seed, "run", *sample) for sample in samples]
    walk = _Walk(policy(text), policy(text.repeat(children, 1, 1)), table, sources, children)
    x = rng.normal_batch(shape, seed, "x_T", list(samples)).to(text.device)
    clean, previous, before = predict(walk.one, table, 0, x), None, x
    rows = torch.arange(len(samples), device=text.device)
    found: list[list[Tensor]] = []
    scores: list[Tensor] = []
    passed: list[Tensor] = []
    k = 0
    while k <= last:
        if k < first:
            after = walk.step(k, x, clean, previous, 1)
            before, x, previous = x, after, clean
            k += 1
            clean = predict(walk.one, table, k, x)
            continue
        states, cleans = walk.segment(k, min(how.segment, last + 1 - k), before, x, clean, previous)
        length = len(states) - 2  # states[0] is the one before the parents
        seen, there = cleans[-1].flatten(0, 1), k + length
        if quiet is not None:
            seen, there = walk.look_ahead(quiet, there, states[-1].flatten(0, 1), cleans[-2:], how.lookahead)
        time = table.timesteps[there] if there < len(table) else torch.zeros(())
        values = checked(_at(score, time.to(x).expand(len(seen))), seen, prompts * children)
        values = values.view(children, -1).T.to(x.device)  # [B,K]
        of, win, lose = _pairs(values, how.threshold, how.all_pairs)
        sides, gap = torch.stack([win, lose]), values[of, win] - values[of, lose]
        for i in range(length):
            three = [states[i + j][sides, of] for j in range(3)]
            found.append([*three, torch.full_like(of, k + i), text[of], gap, of + len(found) * len(samples)])
        scores.append(values.nanmean(1))
        passed.append(torch.zeros_like(rows, dtype=torch.bool).index_fill(0, of, True))
        child = torch.stack([torch.randint(children, (), generator=source) for source in sources]).to(x.device)
        before, x = (state[child, rows] for state in states[-2:])
        previous, clean = cleans[-2][child, rows], cleans[-1][child, rows]
        k += length
    states, places = ([torch.cat(column, dim) for column in columns] for columns, dim in _columns(found))
    return Comparisons(
        *states, *places, shared=how.segment == 1, score=torch.stack(scores), kept=torch.stack(passed), final=x
    )


def _pairs(values: Tensor, threshold: float, every: bool) -> tuple[Tensor, ...]:
    """(prompts, winners, losers) [P] each, from scores [B,K]: the pairs whose scores differ enough."""
    if every:
        of, win, lose = ordered_pairs(values)
    else:
        win, lose, decided = best_and_worst(values)
        of = decided.nonzero()[:, 0]
        win, lose = win[of], lose[of]
    clear = clear_win(values[of, win], values[of, lose], threshold)
    return of[clear], win[clear], lose[clear]


def _at(score: StepScore, t: Tensor) -> Score:
    """The score at fixed timesteps."""
    return lambda clean, prompts: score(clean, prompts, t)


def _columns(found: list[list[Tensor]]) -> list[tuple[list[tuple[Tensor, ...]], int]]:
    """The columns of `found` with the dim to join them along: 1 for states, 0 for the others."""
    columns = list(zip(*found, strict=True))
    return [(columns[:3], 1), (columns[3:], 0)]


@dataclass(frozen=True, eq=False)
class _Walk:
    """Steps of one or K states per prompt, and segments: K children of one state."""

    one: Denoiser
    several: Denoiser
    table: StepTable
    sources: list[torch.Generator]
    children: int

    def step(self, k: int, x: Tensor, clean: Tensor, previous: Tensor | None, times: int) -> Tensor:
        """The next states [times B,...]; `times` draws from the generator of each prompt."""
        mean, std = step_gaussian(self.table, k, widen(x), clean, previous)
        if not self.table.stochastic[k]:
            return mean.to(x.dtype)
        noise = torch.cat([draw_noise(self.sources, some) for some in x.chunk(times)])
        return Gaussian(mean, std).sample(noise).to(x.dtype)

    def segment(
        self, k: int, length: int, before: Tensor, x: Tensor, clean: Tensor, previous: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States [K,B,...] from the one before the parents to the end of the segment, and clean predictions from the
        parents to there. After the last step, the prediction is the finished picture itself."""
        drawn = branch(self.one, self.table, k, x, self.children, self.sources, previous, clean).children
        states = [before.expand_as(drawn), x.expand_as(drawn), drawn]
        cleans = [clean.expand_as(drawn), self.predict(k + 1, drawn)]
        for i in range(k + 1, k + length):
            flat = [tensor.flatten(0, 1) for tensor in (states[-1], cleans[-1], cleans[-2])]
            states.append(self.step(i, *flat, times=self.children).view_as(drawn))
            cleans.append(self.predict(i + 1, states[-1]))
        return states, cleans

    def look_ahead(self, quiet: StepTable, k: int, x: Tensor, cleans: list[Tensor], count: int) -> tuple[Tensor, int]:
        """The clean prediction `count` steps without noise after the states at step k, and the number of that step."""
        previous, clean = (tensor.flatten(0, 1) for tensor in cleans)
        end = min(k + count, len(quiet))
        while k < end:
            x = step_gaussian(quiet, k, widen(x), clean, previous)[0].to(x.dtype)
            k += 1
            previous, clean = clean, (x if k == len(quiet) else predict(self.several, self.table, k, x))
        return clean, k

    def predict(self, k: int, states: Tensor) -> Tensor:
        if k == len(self.table):
            return states
        return predict(self.several, self.table, k, states.flatten(0, 1)).view_as(states)
