"""The result of an evaluation as two files: report.json with every figure, report.html to look at.

`summarise` turns scores into figures, `render_report` turns figures into a page; neither knows a model.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rng import permutation
from .compare import Comparison, compare, reward_gap
from .markup import interval, number
from .picture_folder import write_atomically
from .report_page import render_report

PACKAGES = ("diffusion_align", "torch", "diffusers", "transformers", "peft", "open_clip_torch", "numpy", "Pillow")
_SECRET_KEY = re.compile(r"(^|[_.-])(token|password|passwd|secret|credential|api_?key)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})")
HIDDEN = "(hidden)"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a figure; nothing is imported."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def without_secrets(value: Any, key: str = "") -> Any:
    """A config as plain data without passwords and access tokens, known by their key or by how they look."""
    if isinstance(value, Mapping):
        return {str(k): without_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(v, key) for v in value]
    if value is not None and _SECRET_KEY.search(key):
        return HIDDEN
    if isinstance(value, str):
        return _SECRET_VALUE.sub(HIDDEN, value)
    return value if isinstance(value, int | float | bool | None) else str(value)


def plain(value: Any) -> Any:
    """Data that JSON can hold: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def headline_sentence(metric: str, c: Comparison, *, share: bool, model: str = "tuned") -> str:
    """The result in a sentence: both means, the paired difference, its interval and the number of pairs."""
    unit, points = (" %", " points") if share else ("", "")
    whole = "the fraction of pictures that show their whole prompt"
    what = whole if metric.endswith("/all") else f"the mean of {metric}"
    sentence = (
        f"From base to {model}, {what} goes from {number(c.base, share)}{unit} to {number(c.tuned, share)}{unit}: "
        f"{number(c.difference, share, signed=True)}{points}"
    )
    if not math.isfinite(c.low):
        return f"{sentence} (n = {c.n}, too few for an interval)."
    ends = interval((c.low, c.high), share, signed=True)
    doubt = ", which does not rule out no change" if c.low <= 0 <= c.high else ""
    return f"{sentence} ({100 * c.level:g} % interval {ends}, n = {c.n} pairs){doubt}."


def choose_pairs(base: Tensor, tuned: Tensor, tiebreak: Tensor, n: int, seed: int) -> list[tuple[int, str]]:
    """Up to n pairs to look at: a third the largest gains, a third the largest losses, the rest at random.

    All [N]. `tiebreak`, larger for a greater gain, orders pairs of equal difference. Pairs where the metric does not
    apply come only at random. Returns (index, "gain" | "loss" | "drawn").
    """
    gains = (tuned - base).tolist()
    order = sorted(
        (i for i, g in enumerate(gains) if g != 0 and not math.isnan(g)), key=lambda i: (gains[i], tiebreak[i].item())
    )
    best = [i for i in reversed(order) if gains[i] > 0][: n // 3]
    worst = [i for i in order if gains[i] < 0][: n // 3]
    taken = {*best, *worst}
    drawn = [i for i in permutation(len(gains), seed, "report").tolist() if i not in taken][: n - len(taken)]
    return [*((i, "gain") for i in best), *((i, "loss") for i in worst), *((i, "drawn") for i in drawn)]


def summarise(
    prompts: Sequence[str],
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    headline: str | None,
    seed: int = 0,
    resamples: int = 10_000,
    shown: int = 18,
    model: str = "tuned",
) -> dict[str, Any]:
    """Every figure of a report, from two results of `score` on the same prompts.

    A name with a "/" is a judge's attribute, a fraction; the others are rewards. `headline` is None where nothing was
    scored: the pairs to look at then come at random. Raises ValueError when the headline is not among the metrics, when
    there is no prompt, or when a vector is not [N].
    """
    if headline is None and base or headline is not None and headline not in base:
        raise ValueError(f"no metric {headline!r} to put in the headline: there are {', '.join(base) or 'none'}")
    if not prompts:
        raise ValueError("there is no prompt to report on")
    for name, values in (*base.items(), *tuned.items()):
        if tuple(values.shape) != (len(prompts),):
            raise ValueError(f"{name} is {list(values.shape)}: expected one score for each of {len(prompts)} prompts")
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    groups = torch.tensor([distinct[prompt] for prompt in prompts])
    comparisons = compare(base, tuned, groups=groups, seed=seed, resamples=resamples)
    rewards = [name for name in base if "/" not in name]
    judges = [name for name in base if name.endswith("/all")]
    gaps = {r: {j: asdict(reward_gap(base[r], tuned[r], base[j], tuned[j])) for j in judges} for r in rewards}
    nothing = torch.zeros(len(prompts))
    before, after = (nothing, nothing) if headline is None else (base[headline], tuned[headline])
    tiebreak = tuned[rewards[0]] - base[rewards[0]] if rewards else after - before
    picked = choose_pairs(before, after, tiebreak, shown, seed)
    sentence = (
        f"Base and {model} side by side on {len(distinct)} prompts; nothing scored them."
        if headline is None
        else headline_sentence(headline, comparisons[headline], share="/" in headline, model=model)
    )
    columns = [scores[name].tolist() for scores in (base, tuned) for name in comparisons]
    rows = zip(*columns, strict=True) if columns else [()] * len(prompts)
    return {
        "headline": {"metric": headline, "sentence": sentence},
        "model": model,
        "n_prompts": len(prompts),
        "bootstrap": {"resamples": resamples, "seed": seed},
        "metrics": {name: asdict(c) for name, c in comparisons.items()},
        "reward_gap": gaps,
        "shown": [{"index": i, "why": why} for i, why in picked],
        "prompts": [
            {
                "prompt": prompt,
                "base": dict(zip(comparisons, row[: len(comparisons)], strict=True)),
                "tuned": dict(zip(comparisons, row[len(comparisons) :], strict=True)),
            }
            for prompt, row in zip(prompts, rows, strict=True)
        ],
    }


def write_report(
    folder: str | Path,
    figures: Mapping[str, Any],
    *,
    title: str = "Base and tuned",
    pictures: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    table: str | None = None,
) -> dict[str, Any]:
    """Write report.json, report.html and report.csv into a folder and return what report.json holds.

    Args:
        figures: what `summarise` returns, and what `breakdown` found: comparisons, order, categories, distances.
        pictures: prompt index -> (base, tuned) pictures [3,H,W] in [0, 1]; none are shown without it.
        rows: rows of metrics.jsonl, for the curves.
        config: the resolved config of the run; access tokens in it are hidden.
        facts: what made the pictures: seed, sampler, guidance, fingerprints of the models.
        table: the text of report.csv; none is written without it.
    """
    folder = Path(folder)
    made = {"facts": without_secrets(facts or {}), "versions": versions(), "config": without_secrets(config or {})}
    report = plain({"title": title, **figures, **made})
    shots = {entry["index"]: pictures(entry["index"]) for entry in report["shown"]} if pictures else {}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False)  # ASCII: also holds a prompt that is not valid Unicode
    files = {"report.json": text, "report.html": render_report(report, shots, rows)}
    for name, content in (files | ({"report.csv": table} if table else {})).items():
        write_atomically(folder / name, content.encode("utf-8"))
    return report
