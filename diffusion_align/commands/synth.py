"""`data synth`: prompts, models and rewards in, rankings and pairs out (Syn-Pic of Karthik et al., arXiv 2410.18013).

    <out>/synth.json                 what is drawn; a run that asks for something else is refused
          pictures/  scores/         see `synth_parts`
          rankings.parquet  pairs.parquet  report.json    written when every part is there

A run can be killed anywhere, and the same command goes on. More rewards may be asked for later: they score what is
there.
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
from diffusion_align.commands.pasted import pasted
from diffusion_align.commands.plan_online import TINY_SEED
from diffusion_align.commands.sources import read_prompts
from diffusion_align.commands.synth_parts import (
    Source,
    draw,
    numbers_of,
    parts_of,
    picture_path,
    read_scores,
    sampler_of,
    score,
    source_of,
)
from diffusion_align.data import Ranking, write_rankings_parquet
from diffusion_align.data.labels import agreement, dealt, decided, relevances, scorer_figures, write_best_and_worst
from diffusion_align.data.readers import digest
from diffusion_align.evaluation.report import plain, versions
from diffusion_align.options import Synth, to_yaml
from diffusion_align.options.names import shard_of
from diffusion_align.shapes import sample_captions

TINY_PROMPTS = 800


def synth(options: Synth) -> int:
    """Draw, score, and write rankings and pairs; see `Synth` for what can be asked."""
    o, out = options, Path(options.out)
    prompts = synth_prompts(o)
    sources = [source_of(name) for name in o.models]
    claim(out, o, prompts, sources)
    k, n = shard_of(o.shard)
    parts = parts_of(prompts)
    threads.settle(o.threads)
    try:
        for number, source in enumerate(sources):
            draw(o, out, prompts, parts[k::n], source, number)
        for name in o.rewards:
            score(o, out, prompts, parts[k::n], name)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished stays in {out}; the same command goes on") from None
    scores = read_scores(out, o, len(prompts), parts)
    if scores is None:
        print(f"shard {k}/{n} is done; when all are, the last one, or any of them again, writes the tables")
        return 0
    return write_tables(o, out, prompts, sources, scores)


def synth_prompts(o: Synth) -> list[str]:
    """The prompts that the options name, each once; ValueError for a file without one."""
    if o.prompts == "tiny":
        return sample_captions(o.num_prompts or TINY_PROMPTS, TINY_SEED, unique=True)
    return list(dict.fromkeys(read_prompts(o.prompts or "")))[: o.num_prompts]


def claim(out: Path, o: Synth, prompts: list[str], sources: list[Source]) -> None:
    """Write down what the folder's pictures are; ValueError when they are something else."""
    facts = {
        "models": [source.fingerprint for source in sources],
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
    with staging(out) as staged:
        (staged / path.name).write_text(json.dumps(facts, indent=1), encoding="utf-8")


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder whose files appear in `out` at the end, one by one and whole; shards may do so at the same time."""
    with TemporaryDirectory(prefix=".tmp-", dir=out) as folder:
        yield Path(folder)
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, out / path.name)


def write_tables(o: Synth, out: Path, prompts: list[str], sources: list[Source], scores: Tensor) -> int:
    """rankings.parquet, pairs.parquet of the best and the worst, and report.json; with random labels, random_*."""
    rankings: list[Ranking] = []
    by_model: list[list[float]] = [[] for _ in sources]
    tied = few = 0
    for number, (places, relevance) in enumerate(relevances(scores)):
        if o.random_labels:
            relevance = dealt(relevance, o.seed, prompts[number])
        if not relevance:
            few += 1
        elif len(set(relevance)) == 1:
            tied += 1
        else:
            pictures = tuple(picture_path(out, number, place) for place in places)
            said = tuple(tuple(row[number, places].tolist()) for row in scores)
            rankings.append(Ranking(str(number), prompts[number], pictures, tuple(relevance), said))
            for place, phi in zip(places, relevance, strict=True):
                by_model[place % len(sources)].append(phi)
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
        "decided": decided(rankings),
        "scorers": scorer_figures(scores, rewards),
        "agreement": agreement(scores, rewards),
        "models": [
            {
                "name": source.name,
                "weights": source.fingerprint,
                "mean_relevance": sum(phis) / len(phis) if phis else None,
            }
            for source, phis in zip(sources, by_model, strict=True)
        ],
        "seed": o.seed,
        "sampler": sampler_of(o) | {"guidance": o.guidance},
        "versions": versions(),
    }
    with staging(out) as staged:
        write_rankings_parquet(staged / f"{stem}rankings.parquet", rankings)
        write_best_and_worst(staged / f"{stem}pairs.parquet", rankings, o.seed)
        (staged / f"{stem}report.json").write_text(json.dumps(plain(report), indent=1), encoding="utf-8")
    model = sources[0].base["pretrained_model_name_or_path"]
    print(
        f"{len(rankings)} rankings of {len(prompts)} prompts ({tied} all tied, {few} with too few scores) in {out}\n"
        f"next: {pasted('train', 'rankdpo', '--model', model, '--train_data_dir', out / f'{stem}rankings.parquet')}\n"
        f"or: {pasted('train', 'dpo', '--model', model, '--train_data_dir', out / f'{stem}pairs.parquet')}"
    )
    return 0


def dry_run(o: Synth) -> int:
    """Print the resolved options and, as comments under them, what they would draw and score."""
    prompts, (k, n) = synth_prompts(o), shard_of(o.shard)
    parts = parts_of(prompts)
    mine = sum(len(numbers_of(part, prompts)) for part in parts[k::n])
    guided = 1 if o.guidance == 1 else 2
    shares = [f"{len(range(m, o.pictures, len(o.models)))} by {name}" for m, name in enumerate(o.models)]
    lines = [
        f"prompts          {len(prompts)} of {o.prompts}" + (f", {mine} in shard {k}/{n}" if n > 1 else ""),
        f"pictures         {o.pictures} of each: {', '.join(shares)}; {mine * o.pictures} in all",
        f"evaluations      {guided * o.steps} of the network a picture",
        f"scores           {mine * o.pictures * len(o.rewards)}, by {', '.join(o.rewards) or 'nobody'}",
        *(["labels           dealt out at random: a control"] if o.random_labels else []),
    ]
    print(to_yaml(o, "data synth") + "\n" + "\n".join(f"# {line}" for line in lines))
    return 0
