"""The results of `evaluate`: every model against the base, as a report and as lines on a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.commands.evaluate.contenders import Contender
from diffusion_align.commands.evaluate.judging import Judging, reference_features
from diffusion_align.commands.prompt_lists import Prompt
from diffusion_align.commands.prompt_lists import by_category as prompts_by_category
from diffusion_align.evaluation import (
    Measured,
    as_csv,
    by_category,
    comparisons,
    distances_to,
    order_of_models,
    pairs_picture,
    read_picture,
    summarise,
    write_report,
)
from diffusion_align.options import Evaluate
from diffusion_align.options.sample import rewards_of

SHEET_SIDE = 192  # pixels of a picture on the contact sheet
SHEET_PAIRS = 12


def report(
    o: Evaluate, out: Path, names: dict[str, Contender], prompts: Sequence[Prompt], texts: list[str], judging: Judging,
    measured: dict[tuple[str, str], Measured], folders: dict[tuple[str, str], Path], facts: dict[str, Any],
) -> int:  # fmt: skip
    """Write the report and the contact sheet of the first model by the first sampler, and print a summary."""
    first, lead = next(name for name in names if name != "base"), o.sampler[0]
    base, tuned = measured["base", lead], measured[first, lead]
    distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    groups = torch.tensor([distinct[text] for text in texts])
    headline = "judge/all" if judging.judges else next(iter(judging.rewards), None)
    per_prompt = o.num_images_per_prompt
    categories = {
        category: [number * per_prompt + which for number in numbers for which in range(per_prompt)]
        for category, numbers in prompts_by_category(prompts).items()
    }
    resampling = {"seed": o.seed, "resamples": 10_000}
    bases = [one for (name, _), one in measured.items() if name == "base"]
    models = [one for (name, _), one in measured.items() if name != "base"]
    compared = comparisons(bases, models, groups, **resampling)
    scored = (["judge/all"] if judging.judges else []) + list(judging.rewards)
    further: dict[str, Any] = {
        "comparisons": compared,
        "order": order_of_models(compared, headline) if headline is not None else {},
        "categories": by_category(base.scores, tuned.scores, scored, categories, groups, **resampling),
        "features": o.features if judging.features is not None else "none",
    }
    if (reference := reference_features(o, judging, prompts)) is not None:
        further["distances"] = distances_to(reference, list(measured.values()))

    def pair(i: int) -> tuple[Tensor, Tensor]:
        return read_picture(folders["base", lead], i, per_prompt), read_picture(folders[first, lead], i, per_prompt)

    figures = summarise(texts, base.scores, tuned.scores, headline=headline, seed=o.seed, shown=o.pictures, model=first)
    several = f"{', '.join(list(names)[1:])} against base"
    found = write_report(
        out,
        figures | further,
        title=several if len(names) > 2 else f"{names[first].name}: base and tuned",
        pictures=pair,
        rows=_metrics(Path(o.run[0]) / "metrics.jsonl"),
        config=names[first].config,
        facts={**facts, "samplers": ", ".join(o.sampler), "rewards": ", ".join(rewards_of(o)) or "none"},
        table=as_csv(texts, categories, list(measured.values())),
    )
    chosen = [entry["index"] for entry in found["shown"]][:SHEET_PAIRS]
    _write_sheet(chosen, pair, texts, base.scores, tuned.scores, out / "pairs.png")
    print("\n".join(summary(found)))
    print(f"report: {out / 'report.html'}")
    return 0


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl, which a run from elsewhere may lack."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _write_sheet(
    indices: Sequence[int], pair: Any, texts: Sequence[str], base: Mapping[str, Tensor], tuned: Mapping[str, Tensor],
    path: Path,
) -> None:  # fmt: skip
    if not indices:
        return
    before, after = (torch.stack(side) for side in zip(*(pair(i) for i in indices), strict=True))
    marks = [
        tuple(bool(scores["judge/all"][i]) if "judge/all" in scores else None for scores in (base, tuned))
        for i in indices
    ]
    factor = max(1, SHEET_SIDE // before.shape[-1])
    pairs_picture(before, after, [texts[i] for i in indices], [(a, b) for a, b in marks], path, factor=factor)


def summary(report: dict[str, Any]) -> list[str]:
    """The report's headline, a line for each metric, and a line for each further model or sampler."""
    means = f"{'base':>8} {'tuned':>8} {'change':>8}"
    head = f"{'metric':18} {'n':>5} {means}   {'95 % interval':18} {'better':>7} {'worse':>6}"
    lines = [report["headline"]["sentence"]]
    if report["metrics"]:
        lines += ["", head, *(_line(name, m) for name, m in report["metrics"].items() if m["n"])]
    for row in report.get("comparisons", []):
        if not report["metrics"] and (variety := row.get("diversity")) is not None:
            lines.append(_line(f"variety {row['model']} {row['sampler']}", variety))
    metric, compared = report["headline"]["metric"], report.get("comparisons", [])
    if len(compared) > 1 and metric is not None:
        lines += ["", f"{metric} by model and sampler"]
        lines += [_line(f"{row['model']} {row['sampler']}", row["metrics"][metric]) for row in compared]
    if len({tuple(order) for order in report.get("order", {}).values()}) > 1:
        orders = "; ".join(f"{sampler}: {' > '.join(order)}" for sampler, order in report["order"].items())
        lines.append(f"note: the samplers disagree about the order of the models: {orders}")
    return lines


def _line(name: str, m: dict[str, Any]) -> str:
    interval = "" if m["low"] is None else f"{m['low']:+.4f} to {m['high']:+.4f}"
    numbers = f"{m['base']:8.4f} {m['tuned']:8.4f} {m['difference']:+8.4f}"
    return f"{name:18} {m['n']:5d} {numbers}   {interval:18} {m['wins']:7d} {m['losses']:6d}"
