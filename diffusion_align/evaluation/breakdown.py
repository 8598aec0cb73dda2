"""What a report holds beside its first comparison: categories, further models and samplers, variety, distances."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .compare import compare, compare_metric
from .distances import FEW_FOR_FID, cmmd, diversity, frechet, kid

Scores = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Measured:
    """One model's pictures by one sampler: scores `{metric: [N]}`, and the features [N,D] of the pictures, if any."""

    model: str
    sampler: str
    scores: Scores
    features: Tensor | None = None


def comparisons(
    base: Sequence[Measured], models: Sequence[Measured], groups: Tensor, *, seed: int, resamples: int
) -> list[dict[str, Any]]:
    """Every model against the base by the same sampler, on every metric, and in variety where features are known."""
    base_of = {one.sampler: one for one in base}
    found = []
    for one in models:
        against = base_of[one.sampler]
        metrics = compare(against.scores, one.scores, groups=groups, seed=seed, resamples=resamples)
        row = {
            "model": one.model,
            "sampler": one.sampler,
            "metrics": {name: asdict(c) for name, c in metrics.items()},
        }
        if one.features is not None and against.features is not None:
            before, after = diversity(against.features, groups), diversity(one.features, groups)  # [G] a prompt each
            if not before.isnan().all():
                row["diversity"] = asdict(compare_metric(before, after, seed=seed, resamples=resamples))
        found.append(row)
    return found


def order_of_models(compared: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[str]]:
    """For each sampler the models, the base among them as "base", from best to worst by a metric's mean."""
    means: dict[str, dict[str, float]] = {}
    for row in compared:
        figures = row["metrics"][metric]
        means.setdefault(row["sampler"], {"base": figures["base"]})[row["model"]] = figures["tuned"]
    return {sampler: sorted(of, key=lambda name: -of[name]) for sampler, of in means.items()}


def by_category(
    base: Scores, tuned: Scores, metrics: Sequence[str], categories: Mapping[str, Sequence[int]], groups: Tensor,
    *, seed: int, resamples: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """`{category: {metric: Comparison}}`, on the pictures whose numbers are listed for a category."""
    found: dict[str, dict[str, Any]] = {}
    for category, numbers in categories.items():
        rows = torch.tensor(list(numbers), dtype=torch.int64)
        found[category] = {
            name: asdict(
                compare_metric(base[name][rows], tuned[name][rows], groups=groups[rows], seed=seed, resamples=resamples)
            )
            for name in metrics
        }
    return found


def distances_to(reference: Tensor, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """KID, CMMD and the Frechet distance of each set of pictures to reference features [M,D]."""
    found = []
    for one in measured:
        if one.features is None:
            continue
        count = min(len(reference), len(one.features))
        found.append({
            "model": one.model, "sampler": one.sampler, "pictures": len(one.features), "reference": len(reference),
            "kid": kid(reference, one.features), "cmmd": cmmd(reference, one.features),
            "frechet": frechet(reference, one.features),
            "few_for_frechet": count < FEW_FOR_FID,
        })  # fmt: skip
    return found


def as_csv(prompts: Sequence[str], categories: Mapping[str, Sequence[int]], measured: Sequence[Measured]) -> str:
    """A row for each picture, model and sampler, with every score; RFC 4180, for a spreadsheet or pandas.

    A prompt that a spreadsheet would take for a formula starts with an apostrophe.
    """
    categories_of: dict[int, list[str]] = {}
    for category, numbers in categories.items():
        for number in numbers:
            categories_of.setdefault(number, []).append(category)
    names = list(dict.fromkeys(name for one in measured for name in one.scores))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["number", "prompt", "categories", "model", "sampler", *names])
    for one in measured:
        columns = {name: one.scores[name].tolist() for name in names if name in one.scores}
        for number, prompt in enumerate(prompts):
            values = [_cell(columns[name][number]) if name in columns else "" for name in names]
            kinds = _harmless("; ".join(categories_of.get(number, [])))
            writer.writerow([number, _harmless(prompt), kinds, _harmless(one.model), one.sampler, *values])
    return text.getvalue()


def _cell(value: float) -> str:
    return "" if value != value else f"{value:.6g}"


def _harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula (OWASP, CSV injection), and that UTF-8 can hold."""
    shown = text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\x00", "\u2400")
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@", "\t", "\r")) else shown
