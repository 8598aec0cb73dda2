"""`reward train-spm`: SPO's step-aware preference model (Liang et al. 2024, arXiv 2406.04314, section 4.1).

The authors' settings for Stable Diffusion 1.5, from PickScore on Pick-a-Pic v1: guidance 5, AdamW with weight decay
0.3, learning rate 3e-6 after 500 steps of warm-up, gradients clipped to 1, 8000 steps of 4 x 16 pairs; for SDXL 1e-6
and 7000 steps.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_align import rng
from diffusion_align.data import Pair
from diffusion_align.data.bad_rows import BadRow
from diffusion_align.data.disk import digest
from diffusion_align.methods.entry import About, Entry, Length, Opened, Started, Trained
from diffusion_align.methods.shared.plan import length_of, require_accumulation
from diffusion_align.methods.shared.preferences import TIMESTEPS, PreferencePairs, accuracy_by_noise, preference_method
from diffusion_align.methods.shared.relabel import describe_labels, labels_of_scores, own_labels, scores_of_pairs
from diffusion_align.options import TrainSpm
from diffusion_align.rewards.step_aware_load import step_aware_scorer
from diffusion_align.rewards.step_aware_model import StepAware, save_step_aware, start_step_aware
from diffusion_align.train.processes import watch
from diffusion_align.train.processes.agree import barrier
from diffusion_align.train.run import Run, StepRecord
from diffusion_align.train.steps import run_steps

ACCURACY = "accuracy.json"
EXAMPLES = 64  # pairs whose latents and pictures are used to fit the patches of a scorer that reads latents


def start(o: TrainSpm, opened: Opened) -> Started:
    """Hold pairs out, encode both sides, label them, and make the scorer that is trained."""
    training, held = hold_out(opened.items, o.held_out, o.seed)
    opened.accelerator.print(f"pairs: {len(training)} to train on, {len(held)} held out")
    model, device = opened.model, opened.accelerator.device

    def predict_clean(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return model.denoiser(text, o.guidance)(x, t)

    def preferences(some: list[Pair], bad_rows: Sequence[BadRow]) -> PreferencePairs:
        cache = opened.encode(some, bad_rows)
        kept = [some[place] for place in cache.kept]
        labels = labels_of(kept, o, opened)
        return PreferencePairs(cache, [pair.prompt for pair in kept], predict_clean, decode, model.schedule, labels)

    decode = model.decode if o.inputs == "pictures" else _unchanged
    pairs = preferences(training, opened.bad_rows)
    aside = preferences(held, ()) if held else None
    latents, examples = None, None
    if o.inputs == "latents":
        latents, known = opened.shape, pairs.cache.batch(range(min(EXAMPLES, len(pairs.cache))))[0].flatten(0, 1)
        examples = known, model.decode(known).cpu()
    # Equal on all ranks, because every random draw has an address.
    scorer = start_step_aware(o.reward, device=device, latents=latents, examples=examples, seed=o.seed)
    report = AccuracyReport(o, aside, scorer, opened.folder)
    named = {name: weight for name, weight in scorer.named_parameters() if weight.requires_grad}

    def loop(run: Run, length: Length) -> Iterator[StepRecord]:
        if run.accelerator.is_main_process and run.progress.step == 0:
            report.measure("before")
        method = preference_method(pairs, scorer, run)
        return run_steps(method, run, batch_size=length.batch, accumulation=length.accumulation)

    labels = digest(pairs.wanted.double().numpy().tobytes())
    return Started(
        count=len(pairs.cache),
        identity=pairs.cache.identity | {"labels": labels},
        loop=loop,
        trained=Trained(named, lambda folder: save_step_aware(scorer, folder), pictures=False),
        report=report.finish,
    )


class AccuracyReport:
    """accuracy.json: how well the scorer ranks the held-out pairs at each noise level, before and after training."""

    def __init__(self, o: TrainSpm, aside: PreferencePairs | None, scorer: StepAware, folder: Path):
        self.options, self.aside, self.scorer, self.file = o, aside, scorer, folder / ACCURACY

    def measure(self, when: str) -> dict[int, float]:
        """Measure accuracy now and write it to the file under `when`: "before" or "after"."""
        watch.record_activity("measuring accuracy")
        found: dict[int, float] = {}
        if self.aside is not None:
            times = [t for t in TIMESTEPS if t < self.aside.schedule.num_timesteps]
            score, device = step_aware_scorer(self.scorer), next(self.scorer.parameters()).device
            found = accuracy_by_noise(self.aside, score, seed=self.options.seed, timesteps=times, device=device)
        # Training that starts anew may find the file of an earlier run.
        self.write({**(self.read() if when == "after" else self.header()), when: found})
        return found

    def read(self) -> dict[str, Any]:
        """The content of the file: in a resumed run, with the accuracy before training."""
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else self.header()

    def header(self) -> dict[str, Any]:
        """What the file says before anything is measured."""
        o, held = self.options, len(self.aside.prompts) if self.aside else 0
        labels = {"labels": o.relabel or "data", "tie_margin": o.tie_margin if o.relabel else None}
        return {"steps": 0, "guidance": o.guidance, "held_out": held, **labels}

    def write(self, known: dict[str, Any]) -> None:
        self.file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

    def finish(self, steps: int) -> None:
        """Measure again and print both."""
        after = self.measure("after")
        known = {**self.read(), "steps": steps}
        self.write(known)
        before = {int(t): value for t, value in known.get("before", {}).items()}
        print("\n".join(accuracy_table(before, after)))


@watch.names_failed_rank()
def labels_of(pairs: Sequence[Pair], o: TrainSpm, opened: Opened) -> Tensor:
    """The probability [N] that the first picture of each pair is better, by the data or the reward `relabel`."""
    own, accelerator = own_labels(pairs), opened.accelerator
    if o.relabel_spec is None:
        if o.keep_ties:
            accelerator.print(f"labels: of the data on {len(pairs)} pairs, of which {int((own == 0.5).sum())} are ties")
        return own
    watch.record_activity("relabelling")
    folder, main = Path(o.cache_dir or o.output_dir) / "labels", accelerator.is_main_process
    if not main:
        barrier(accelerator)  # rank 0 scores, the others read its file
    scores = scores_of_pairs(o.relabel_spec, pairs, folder, partial(opened.reward, o.relabel_spec), progress=main)
    if main:
        barrier(accelerator)
    labels = labels_of_scores(scores, o.tie_margin)
    accelerator.print(describe_labels(o.relabel_spec.text, own, labels, o.tie_margin))
    return labels


def _unchanged(latents: Tensor) -> Tensor:
    """In place of a decoder, for a scorer that reads latents."""
    return latents


def hold_out(pairs: Sequence[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and at least `count` held-out pairs, both in their order. No prompt is in both.

    Raises:
        ValueError: no pair would be left to train on.
    """
    sizes = Counter(pair.prompt for pair in pairs)
    prompts, held, total = list(sizes), set(), 0
    for place in rng.permutation(len(prompts), seed, "held out").tolist():
        if total >= count:
            break
        held.add(prompts[place])
        total += sizes[prompts[place]]
    training = [pair for pair in pairs if pair.prompt not in held]
    if not training:
        raise ValueError(f"held_out {count} leaves none of {len(pairs)} pairs to train on")
    return training, [pair for pair in pairs if pair.prompt in held]


def accuracy_table(before: dict[int, float], after: dict[int, float]) -> list[str]:
    """Lines for a terminal; none if no pair was held out."""
    rows = [f"{t:8d} {before[t]:8.3f} {after[t]:8.3f} {after[t] - before[t]:+8.3f}" for t in before]
    return [f"{'timestep':>8} {'before':>8} {'after':>8} {'change':>8}", *rows] if rows else []


def length(o: TrainSpm, about: About) -> Length:
    return length_of(o, about, "pairs")


METHOD = Entry(
    verb="reward train-spm",
    data="pairs",
    shown=("accuracy",),
    require=require_accumulation,
    count=lambda o, items: len(hold_out(items, o.held_out, o.seed)[0]),
    length=length,
    constants=lambda o, about: [],
    start=start,
    unet=False,
)
