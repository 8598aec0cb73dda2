"""`evaluate`: base and tuned pictures of the same prompts from the same noise, scored, compared and reported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_align.commands.sources import present_model, read_prompts
from diffusion_align.commands.tuned import base_of, load_tuned, run_config, trained_weights, weights_digest
from diffusion_align.evaluation import (
    evaluation_table,
    pairs_picture,
    read_picture,
    read_pictures,
    save_pictures,
    score,
    write_report,
)
from diffusion_align.options import Evaluate, UsageError
from diffusion_align.rewards import clip_scorer
from diffusion_align.shapes import judge, parse, sample_captions
from diffusion_align.shapes.render import PIXELS

if TYPE_CHECKING:
    from diffusion_align.models import TextToImage

HELD_OUT = "held-out"
HELD_OUT_SEED = 0  # of the captions, apart from --seed, so that another noise is tried on the same prompts
SHEET_SIDE = 192  # pixels of a picture on the contact sheet


def evaluate(options: Evaluate) -> int:
    """Evaluate a run against its base; writes report.html, report.json and pairs.png into the run folder."""
    o = options
    assert o.run is not None  # the options' own check says so
    run, config = Path(o.run), run_config(o.run)
    trained_weights(run)
    prompts = evaluation_prompts(o.prompts, o.num_prompts)
    in_world = all(_in_world(prompt) for prompt in prompts)
    if o.reward == "tiny" and not in_world:
        raise UsageError("the embedded reward knows captions of the embedded world only; give --reward NAME or none")
    if o.reward == "none" and not in_world:
        raise UsageError("nothing to score with: no reward, and the prompts are not captions of the embedded world")

    from diffusion_align.models import load_pipeline  # seconds, so after everything that can be refused

    rewards = {} if o.reward == "none" else {"reward": clip_scorer(o.reward, device=o.device)}

    base = base_of(config)
    name = present_model(base["pretrained_model_name_or_path"])
    gate = load_pipeline(name, device=o.device, revision=base["revision"], variant=base["variant"])
    judges = {"judge": judge} if in_world and gate.resolution == PIXELS else {}
    if not judges and not rewards:
        raise ValueError(f"nothing to score with: no reward, and the judge reads {PIXELS}-pixel pictures only")
    facts = {
        "model": name,
        "fingerprint": gate.fingerprint(),
        "trained_weights": weights_digest(run),
        "prompts": o.prompts,
        "distinct_prompts": len(set(prompts)),
        "seed": o.seed,
        "sampler": f"DPM-Solver++ 2M, {o.steps} steps, trailing",
        "guidance": o.guidance,
        "mixed_precision": o.mixed_precision,
        "reward": o.reward,
    }
    # Another seed, guidance or training gets another folder; the same one goes on where it was cut off.
    folder = run / "evaluation" / _key(facts | {"prompts": prompts})
    settings = {"seed": o.seed, "steps": o.steps, "guidance": o.guidance, "batch_size": o.batch_size}
    _draw(gate, prompts, folder / "base", "base", o.mixed_precision, {"weights": "base"}, **settings)
    load_tuned(gate, run)
    facts_of_tuned = {"weights": facts["trained_weights"]}
    _draw(gate, prompts, folder / "tuned", "tuned", o.mixed_precision, facts_of_tuned, **settings)
    scores = {
        side: score(read_pictures(folder / side, len(prompts)), prompts, rewards, judges=judges)
        for side in ("base", "tuned")
    }
    report = write_report(
        run,
        prompts,
        scores["base"],
        scores["tuned"],
        headline="judge/all" if judges else "reward",
        pictures=lambda i: (read_picture(folder / "base", i), read_picture(folder / "tuned", i)),
        rows=_metrics(run / "metrics.jsonl"),
        config=config,
        facts=facts,
        title=f"{run.name}: base and tuned",
        seed=o.seed,
        shown=o.pictures,
    )
    _write_sheet(folder, [entry["index"] for entry in report["shown"]], prompts, scores, run / "pairs.png")
    print("\n".join(summary(report)))
    print(f"report: {run / 'report.html'}")
    return 0


def evaluation_prompts(source: str, n: int) -> list[str]:
    """The first n prompts of a file, or n captions of the embedded world whose combination no training caption names.

    Those are drawn as the training captions are, so short ones come more than once, each time from another noise.
    """
    if source == HELD_OUT:
        return sample_captions(n, HELD_OUT_SEED, split="held-out")
    return read_prompts(source)[:n]


def _in_world(prompt: str) -> bool:
    try:
        parse(prompt)
    except ValueError:
        return False
    return True


def _key(facts: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6).hexdigest()


def _draw(
    gate: TextToImage,
    prompts: list[str],
    folder: Path,
    side: str,
    mixed_precision: str,
    facts: dict[str, str],
    *,
    seed: int,
    steps: int,
    guidance: float,
    batch_size: int,
) -> None:
    table = evaluation_table(gate.schedule, steps)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision)
    with (
        torch.autocast(gate.device.type, dtype=half, enabled=half is not None),
        tqdm(total=len(prompts), desc=side, unit="picture", disable=None) as bar,
    ):
        for indices in save_pictures(
            gate, prompts, folder, seed=seed, table=table, guidance=guidance, batch_size=batch_size, facts=facts
        ):
            bar.update(len(indices))


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics; a run that was made elsewhere may come without them."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _write_sheet(
    folder: Path, indices: list[int], prompts: list[str], scores: dict[str, dict[str, Tensor]], path: Path
) -> None:
    if not indices:
        return
    base, tuned = (torch.stack([read_picture(folder / side, i) for i in indices]) for side in ("base", "tuned"))
    marks = [
        tuple(bool(scores[side]["judge/all"][i]) if "judge/all" in scores[side] else None for side in ("base", "tuned"))
        for i in indices
    ]
    factor = max(1, SHEET_SIDE // base.shape[-1])
    pairs_picture(base, tuned, [prompts[i] for i in indices], [(a, b) for a, b in marks], path, factor=factor)


def summary(report: dict[str, Any]) -> list[str]:
    """The report's headline and one line a metric, for a terminal."""
    means = f"{'base':>8} {'tuned':>8} {'change':>8}"
    head = f"{'metric':18} {'n':>5} {means}   {'95 % interval':18} {'better':>7} {'worse':>6}"
    lines = [report["headline"]["sentence"], "", head]
    for name, m in report["metrics"].items():
        if not m["n"]:
            continue
        interval = "" if m["low"] is None else f"{m['low']:+.4f} to {m['high']:+.4f}"
        numbers = f"{m['base']:8.4f} {m['tuned']:8.4f} {m['difference']:+8.4f}"
        lines.append(f"{name:18} {m['n']:5d} {numbers}   {interval:18} {m['wins']:7d} {m['losses']:6d}")
    return lines
