"""`data synth`: prompts, models and rewards in, rankings and pairs out (Syn-Pic of Karthik et al., arXiv 2410.18013).

    <out>/synth.json                 what is drawn; a run that asks for something else is refused
          pictures/  scores/         see `synth_chunks`
          rankings.parquet  pairs.parquet  report.json    written once all chunks are done

A run can be killed anywhere, and the same command goes on. Rewards that are added later score the pictures that exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from diffusion_align.commands import threads
from diffusion_align.commands.data.synth_chunks import (
    DrawingModel,
    chunks_of,
    draw_pictures,
    drawing_model,
    numbers_of,
    read_scores,
    sampler_of,
    score_pictures,
    synth_picture,
)
from diffusion_align.commands.data.synth_labels import (
    agreement,
    decided_fraction,
    relevances,
    scorer_figures,
    shuffled_relevance,
    write_best_and_worst,
)
from diffusion_align.commands.printed_commands import command_line
from diffusion_align.commands.sources import read_prompts
from diffusion_align.commands.train.items import TINY_SEED
from diffusion_align.data import Ranking, write_rankings_parquet
from diffusion_align.data.disk import digest
from diffusion_align.evaluation.report import plain, versions
from diffusion_align.options import Synth, to_yaml
from diffusion_align.options.names import shard_of
from diffusion_align.shapes import sample_captions

TINY_PROMPTS = 800


def synth(options: Synth) -> int:
    """Draw, score, and write rankings and pairs."""
    o, out = options, Path(options.out)
    prompts = synth_prompts(o)
    models = [drawing_model(name) for name in o.models]
    _claim(out, o, prompts, models)
    k, n = shard_of(o.shard)
    chunks = chunks_of(prompts)
    threads.set_threads(o.threads)
    try:
        for number, model in enumerate(models):
            draw_pictures(o, out, prompts, chunks[k::n], model, number)
        for name in o.rewards:
            score_pictures(o, out, prompts, chunks[k::n], name)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished stays in {out}; the same command goes on") from None
    scores = read_scores(out, o, len(prompts), chunks)
    if scores is None:
        print(f"shard {k}/{n} is done; the last shard to finish writes the tables, or any shard that is run again")
        return 0
    return _write_tables(o, out, prompts, models, scores)


def synth_prompts(o: Synth) -> list[str]:
    """The prompts that the options name, each once; ValueError for a file without one."""
    if o.prompts == "tiny":
        return sample_captions(o.num_prompts or TINY_PROMPTS, TINY_SEED, unique=True)
    return list(dict.fromkeys(read_prompts(o.prompts or "")))[: o.num_prompts]


def _claim(out: Path, o: Synth, prompts: list[str], models: list[DrawingModel]) -> None:
    """Write down what the folder's pictures are of; ValueError if it holds others."""
    facts = {
        "models": [model.fingerprint for model in models],
        "prompts": digest("\n".join(prompts).encode()),
        "sampler": sampler_of(o) | {"guidance": o.guidance},
        **{name: getattr(o, name) for name in ("pictures", "seed", "resolution", "mixed_precision")},
    }
    path = out / "synth.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else facts
    other = [name for name in facts if known.get(name) != facts[name]]
    if other:
        raise ValueError(f"{out} holds pictures made with other {', '.join(other)}: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with _staged_files(out) as staged:
        (staged / path.name).write_text(json.dumps(facts, indent=1), encoding="utf-8")


@contextmanager
def _staged_files(out: Path) -> Iterator[Path]:
    """A folder whose files are moved to `out` at the end, each complete; shards may do so at the same time."""
    with TemporaryDirectory(prefix=".tmp-", dir=out) as folder:
        yield Path(folder)
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, out / path.name)


def _write_tables(o: Synth, out: Path, prompts: list[str], models: list[DrawingModel], scores: Tensor) -> int:
    """rankings.parquet, pairs.parquet of the best and the worst, and report.json; with random labels, random_*."""
    rankings: list[Ranking] = []
    by_model: list[list[float]] = [[] for _ in models]
    tied = few = 0
    for number, (places, relevance) in enumerate(relevances(scores)):
        if o.random_labels:
            relevance = shuffled_relevance(relevance, o.seed, prompts[number])
        if not relevance:
            few += 1
        elif len(set(relevance)) == 1:
            tied += 1
        else:
            pictures = tuple(synth_picture(out, number, place) for place in places)
            by_scorer = tuple(tuple(row[number, places].tolist()) for row in scores)
            rankings.append(Ranking(str(number), prompts[number], pictures, tuple(relevance), by_scorer))
            for place, phi in zip(places, relevance, strict=True):
                by_model[place % len(models)].append(phi)
    if not rankings:
        raise ValueError(f"none of {len(prompts)} prompts has a preference: {tied} all tied, {few} with too few scores")
    stem, rewards = "random_" if o.random_labels else "", list(o.rewards)
    report = {
        "prompts": len(prompts),
        "rankings": len(rankings),
        "all_tied": tied,
        "too_few_scores": few,
        "pictures": {"drawn": len(prompts) * o.pictures, "ranked": sum(map(len, by_model))},
        "random_labels": o.random_labels,
        "decided": decided_fraction(rankings),
        "scorers": scorer_figures(scores, rewards),
        "agreement": agreement(scores, rewards),
        "models": [
            {
                "name": model.name,
                "weights": model.fingerprint,
                "mean_relevance": sum(phis) / len(phis) if phis else None,
            }
            for model, phis in zip(models, by_model, strict=True)
        ],
        "seed": o.seed,
        "sampler": sampler_of(o) | {"guidance": o.guidance},
        "versions": versions(),
    }
    with _staged_files(out) as staged:
        write_rankings_parquet(staged / f"{stem}rankings.parquet", rankings)
        write_best_and_worst(staged / f"{stem}pairs.parquet", rankings, o.seed)
        (staged / f"{stem}report.json").write_text(json.dumps(plain(report), indent=1), encoding="utf-8")
    model = ["--model", models[0].base["pretrained_model_name_or_path"]]
    print(
        f"{len(rankings)} rankings of {len(prompts)} prompts ({tied} all tied, {few} with too few scores) in {out}\n"
        f"next: {command_line('train', 'rankdpo', *model, '--train_data_dir', out / f'{stem}rankings.parquet')}\n"
        f"or: {command_line('train', 'dpo', *model, '--train_data_dir', out / f'{stem}pairs.parquet')}"
    )
    return 0


def dry_run(o: Synth) -> int:
    """Print the resolved options and, as comments under them, what they would draw and score."""
    prompts, (k, n) = synth_prompts(o), shard_of(o.shard)
    mine = sum(len(numbers_of(chunk, prompts)) for chunk in chunks_of(prompts)[k::n])
    guided = 1 if o.guidance == 1 else 2
    by_model = [f"{len(range(m, o.pictures, len(o.models)))} by {name}" for m, name in enumerate(o.models)]
    lines = [
        f"prompts          {len(prompts)} of {o.prompts}" + (f", {mine} in shard {k}/{n}" if n > 1 else ""),
        f"pictures         {o.pictures} of each: {', '.join(by_model)}; {mine * o.pictures} in all",
        f"evaluations      {guided * o.steps} of the network a picture",
        f"scores           {mine * o.pictures * len(o.rewards)}, by {', '.join(o.rewards) or 'nobody'}",
        *(["labels           at random: a control"] if o.random_labels else []),
    ]
    print(to_yaml(o, "data synth") + "\n" + "\n".join(f"# {line}" for line in lines))
    return 0
