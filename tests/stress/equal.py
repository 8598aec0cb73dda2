"""The same training of toys on 1, 2 and 4 processes.

- every draw and every sample is the same; 2 processes equal accumulation 2 to the bit, 4 within 1e-5
- a nan or inf on one of two processes: exactly those steps are skipped, and counted, on both
- memory that runs out on one of two processes: both halve their micro-batches, with the same samples and loss
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers_online import METHODS, Toy
from helpers_train import SCHEDULE, SHAPE, MemoryPairs, make_run, train_rankings

import diffusion_align.rng as rng
from diffusion_align.evaluation import Drawing, generate
from diffusion_align.evaluation.generate import save_pictures
from diffusion_align.methods.shared.pair_losses import PairLoss
from diffusion_align.models import load_pipeline
from diffusion_align.objectives import gain_weights, rank_dpo
from diffusion_align.samplers import step_table
from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.checkpoints.state import pack, restore
from diffusion_align.train.run import Progress
from diffusion_align.train.update import NonFiniteError
from stress.jobs import Tally, launch, timed

RATES = {"prdp": 1e-7}  # with a higher one PRDP on this toy diverges, and so do differences in the last bit
BATCH, SETUPS = 8, ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1))  # processes, accumulation
Result = dict[str, Any]


def on_processes(count: int, work: Callable[[int], Result], folder: Path) -> list[Result]:
    """The results of `work(rank)` on `count` processes."""

    def told(rank: int) -> int:
        (folder / f"result-{rank}.json").write_text(json.dumps(work(rank)))
        return 0

    ended = launch(count, told, folder)
    if any(ended.codes):
        raise RuntimeError(f"exit codes {ended.codes}: {ended.text[-1500:]}")
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(count)]


class Lists(MemoryPairs):
    """Pairs as rankings of two, and a third picture."""

    def __init__(self, count: int = 10):
        super().__init__(count)
        self.lengths = [3] * count
        self.latents = torch.cat([self.latents, rng.normal((count, 1, *SHAPE), 0, "third")], 1)


def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def steps_of(name: str, accumulation: int, steps: int, **more: Any) -> tuple[Any, Iterator[Any]]:
    """An offline toy run and its records."""
    settings = {
        "batch_size": BATCH,
        "accumulation": accumulation,
        "max_steps": steps,
        "total": steps,
        "caption_dropout": 0.3,
    }
    run: Any = make_run(accelerator=accelerator(), **settings)
    if name == "dpo":
        return run, run.steps(**more)
    cache: Any = Lists()
    records = train_rankings(
        cache, [[1.0, 0.5, 0.0]] * len(cache), run.network, run.reference,
        schedule=SCHEDULE, prediction_type="epsilon", loss=partial(rank_dpo, beta=0.5), pair_weights=gain_weights,
        beta=0.5, parameters=list(run.parameters.values()), optimizer=run.optimizer, lr_scheduler=run.lr_scheduler,
        accelerator=run.settings["accelerator"], batch_size=BATCH, seed=3, max_steps=steps, accumulation=accumulation,
        caption_dropout=0.3,
    )  # fmt: skip
    return run, records


def trained(name: str, accumulation: int, steps: int, double: bool, _: int) -> Result:
    """Losses, weights and the addresses of all draws of a toy run.

    Online the gradient norm replaces the loss, which for policy gradients is a rounding error around 0.
    """
    drawn, real = Counter(), rng.generator

    def generator(seed: int, purpose: Any, *address: Any) -> torch.Generator:
        drawn[repr((purpose, *address))] += 1
        return real(seed, purpose, *address)

    rng.generator = generator
    try:
        if name in METHODS:
            toy = Toy(double=double)
            toy.optimizer.param_groups[0]["lr"] = RATES.get(name, 0.05)
            records = toy.rounds(toy.method(name), prompts_per_chunk=1, max_steps=steps, accelerator=accelerator())
            losses, weights = [r.metrics["grad_norm"] for r in records], toy.weights()
        else:
            run, stream = steps_of(name, accumulation, steps)
            losses, weights = [r.loss for r in stream], list(run.weights().values())
    finally:
        rng.generator = real
    return {"losses": losses, "weights": [w.flatten().tolist() for w in weights], "drawn": sorted(drawn)}


def apart(a: Result, b: Result) -> tuple[float, float]:
    """The largest difference of a loss, relative to the largest loss, and the largest difference of a weight."""
    scale = max(map(abs, a["losses"]))
    losses = max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True)) / scale
    weights = max(
        abs(x - y) for v, w in zip(a["weights"], b["weights"], strict=True) for x, y in zip(v, w, strict=True)
    )
    return losses, weights


def equal(folder: Path, name: str, steps: int, tally: Tally, double: bool = False) -> None:
    """The number of processes changes nothing, for one method.

    What an online policy draws depends on what it has learnt, so a difference in the last bit grows from round to
    round: the limit is 1e-9 in float64 and 1e-3 in float32.
    """
    online = name in METHODS
    setups = [(1, 1), (2, 1), (4, 1)] if online else SETUPS
    found = {s: on_processes(s[0], partial(trained, name, s[1], steps, double), folder) for s in setups}
    wanted, limit = found[(1, 1)][0], (1e-9 if double else 1e-3) if online else 1e-5
    for setup, ranks in found.items():
        problems = []
        drawn = {address for rank in ranks for address in rank["drawn"]}
        if drawn != set(wanted["drawn"]):
            problems.append(f"{len(drawn ^ set(wanted['drawn']))} draws are not those of one process")
        if any(rank["weights"] != ranks[0]["weights"] for rank in ranks):
            problems.append("the processes end with different weights")
        losses, weights = apart(wanted, ranks[0])
        problems += [f"figures differ by {losses:.1e}"] if losses > limit else []
        what = f"{name}{' float64' if double else ''}, {setup[0]} processes x accumulation {setup[1]}"
        print(f"  {what}: {'gradient norm' if online else 'loss'} {losses:.1e} relative, weights {weights:.1e}")
        tally.check("equal numbers", [f"{what}: {problem}" for problem in problems])
    if not online:
        same = found[(2, 1)][0]["weights"] == found[(1, 2)][0]["weights"]
        same = same and found[(2, 1)][0]["losses"] == found[(1, 2)][0]["losses"]
        tally.check("equal bits", [] if same else [f"{name}: 2 processes are not accumulation 2"])


def poisoned(kind: str, value: float, at: dict[int, int], folder: Path, steps: int, rank: int) -> Result:
    """A run of DPO, stopped and resumed half-way; `at` {step: rank} names where a number is not finite."""
    skipped, finite, now = [], True, [0]

    def here() -> bool:
        return at.get(now[0] + 1) == rank

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x if not here() else x.index_fill(0, torch.tensor([0]), value)

    progress: Progress | None = None
    for last in (steps // 2, steps):
        run, _ = steps_of("dpo", 1, steps)
        if progress is not None:
            progress = restore(
                checkpoint.load(folder / f"{rank}" / f"step-{steps // 2:08d}"),
                run.parameters,
                run.optimizer,
                run.lr_scheduler,
            )
        settings: dict[str, Any] = {"max_steps": last, "max_skipped_in_row": steps, "progress": progress}
        if kind == "loss":
            real = run.settings["loss"]
            settings["loss"] = PairLoss(lambda pairs, real=real: poison(real(pairs)))
        elif kind == "latent":
            batch = run.settings["cache"].batch
            run.settings["cache"].batch = lambda rows, batch=batch: (poison(batch(rows)[0]), batch(rows)[1])
        else:
            next(iter(run.parameters.values())).register_hook(poison)
        for record in run.steps(**settings):
            now[0] = record.step
            finite &= all(bool(w.isfinite().all()) for w in run.weights().values())
            skipped += [] if record.updated else [record.step]
            progress = record.progress
        assert progress is not None
        tensors, state = pack(run.parameters, run.optimizer, run.lr_scheduler, progress)
        checkpoint.save(folder / f"{rank}", last, tensors, state)
    weights = [w.flatten().tolist() for w in run.weights().values()]
    return {"skipped": skipped, "count": progress.skipped if progress else -1, "finite": finite, "weights": weights}


def not_finite(folder: Path, faults: int, chance: random.Random, tally: Tally, steps: int = 40) -> None:
    """Numbers that are not finite: `faults` of them, ten in a run."""
    for number in range(faults // 10):
        kind, value = ("loss", "latent", "gradient")[number % 3], (float("nan"), float("inf"))[number // 3 % 2]
        at = {step: chance.randrange(2) for step in chance.sample(range(1, steps + 1), 10)}
        where = folder / f"poison-{number}"
        ranks = on_processes(2, partial(poisoned, kind, value, at, where, steps), where)
        for rank in ranks:
            good = rank["finite"] and rank["skipped"] == sorted(at) and rank["count"] == len(at)
            problems = [] if good and rank["weights"] == ranks[0]["weights"] else [f"{at} gave {rank['skipped']}"]
            tally.check(f"not finite: {kind}", [f"{value}: {problem}" for problem in problems])


def poisoned_rounds(kind: str, name: str, faulty: int, steps: int, rank: int) -> Result:
    """An online run with a nan from process 1 in a reward or a gradient of one step."""
    now = [0]

    def here() -> bool:
        return rank == 1 and now[0] + 1 == faulty

    def reward(latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        values = -latents.flatten(1).mean(1)
        return values.index_fill(0, torch.tensor([0]), float("nan")) if here() and kind == "reward" else values

    toy = Toy(reward=reward)
    if kind == "gradient":
        toy.parameters[0].register_hook(lambda g: g * float("nan") if here() else g)
    skipped, items = [], []
    for record in toy.rounds(toy.method(name), max_steps=steps, accelerator=accelerator()):
        now[0] = record.step
        skipped += [] if record.updated else [record.step]
        items.append(record.metrics["items"])
    weights = [w.flatten().tolist() for w in toy.weights()]
    finite = all(bool(w.isfinite().all()) for w in toy.weights())
    return {"skipped": skipped, "items": items, "weights": weights, "finite": finite}


def not_finite_online(folder: Path, chance: random.Random, tally: Tally, steps: int = 6) -> None:
    for name in METHODS:
        for kind in ("reward", "gradient"):
            faulty = chance.randint(2, steps)
            ranks = on_processes(2, partial(poisoned_rounds, kind, name, faulty, steps), folder)
            wanted = [faulty] if kind == "gradient" else []  # a picture without a reward is left out, the step is taken
            problems = [f"{rank['skipped']} skipped" for rank in ranks if rank["skipped"] != wanted]
            problems += (
                [] if all(rank["finite"] and rank["weights"] == ranks[0]["weights"] for rank in ranks) else ["weights"]
            )
            if kind == "reward" and not ranks[0]["items"][faulty - 1] < max(ranks[0]["items"]):
                problems.append("the picture without a reward still counts")
            tally.check(f"not finite: online {kind}", [f"{name}, step {faulty}: {problem}" for problem in problems])


def in_a_row(folder: Path, tally: Tally) -> None:
    """Three bad steps in a row end both processes at the same step."""

    def work(rank: int) -> Result:
        run, _ = steps_of("dpo", 1, 20)
        seen = []
        real = run.settings["loss"]
        run.settings["loss"] = PairLoss(
            lambda pairs: real(pairs) * (float("nan") if rank == 1 and len(seen) >= 6 else 1.0)
        )
        try:
            for record in run.steps(max_skipped_in_row=3):
                seen.append(record.step)
        except NonFiniteError as error:
            return {"seen": seen, "said": str(error)}
        return {"seen": seen, "said": "nothing"}

    ranks = on_processes(2, work, folder)
    good = all(r["seen"] == list(range(1, 10)) and r["said"].startswith("steps 7 to 9 each") for r in ranks)
    tally.check("not finite: in a row", [] if good else [str(ranks)])


def short_of_memory(folder: Path, tally: Tally) -> None:
    """Memory that runs out on process 1 only."""

    def limit(network: Any, rows: int, rank: int) -> Any:
        def call(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            if rank == 1 and len(x) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return network(x, t, text)

        return call

    def offline(rows: int, rank: int) -> Result:
        run, records = steps_of("dpo", 1, 20)
        found = list(run.steps(predict_policy=limit(run.network, rows, rank)))
        weights = [w.flatten().tolist() for w in run.weights().values()]
        return {"losses": [r.loss for r in found], "weights": weights, "halvings": [r.progress.halvings for r in found]}

    def online(name: str, rows: int, rank: int) -> Result:
        toy = Toy(double=True)
        toy.policy_calls.network = limit(toy.network, rows, rank)
        found = list(toy.rounds(toy.method(name), prompts_per_chunk=2, max_steps=4, accelerator=accelerator()))
        weights = [w.flatten().tolist() for w in toy.weights()]
        return {"losses": [r.loss for r in found], "weights": weights, "halvings": [r.progress.halvings for r in found]}

    for name in ("dpo", *METHODS):
        rows = {"dpo": 4, "spo": 6}.get(name, 4)
        work = offline if name == "dpo" else partial(online, name)
        free = on_processes(2, partial(work, 10**6), folder)
        tight = on_processes(2, partial(work, rows), folder)
        losses, _ = apart(free[0], tight[0])
        problems = [] if losses <= 1e-5 else [f"losses differ by {losses:.1e}"]
        problems += (
            []
            if tight[0]["halvings"] == tight[1]["halvings"] and tight[0]["halvings"][-1] > 0
            else [f"{[r['halvings'] for r in tight]}"]
        )
        problems += [] if tight[0]["weights"] == tight[1]["weights"] else ["the processes end with different weights"]
        tally.check("out of memory", [f"{name}: {problem}" for problem in problems])


def shards(folder: Path, tally: Tally) -> None:
    """Pictures of an evaluation by 1, 2 and 4 processes: none missing or double, and equal to 1/255."""
    model = load_pipeline(str(folder / "model"))
    prompts, table = [f"prompt {i}" for i in range(12)], step_table(model.schedule, 3)
    seen: dict[int, dict[str, bytes]] = {}
    for count in (1, 2, 4):
        place = folder / f"shards-{count}"
        drawn = [
            n
            for i in range(count)
            for part in save_pictures(
                model, prompts, place, Drawing(table, guidance=2.0, seed=0, batch_size=3), shard=(i, count)
            )
            for n in part
        ]
        seen[count] = {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*.png"))}
        problems = [] if sorted(drawn) == list(range(12)) else [f"{sorted(drawn)} were drawn"]
        furthest = generate_difference(folder / "shards-1", place) if seen[count] != seen[1] else 0.0
        problems += [] if furthest <= 1 / 255 + 1e-9 else [f"a pixel differs by {furthest}"]
        print(f"  shards {count}: {len(drawn)} pictures, furthest pixel {furthest * 255:.0f}/255")
        tally.check("equal pictures", problems)


def generate_difference(a: Path, b: Path) -> float:
    pairs = zip(generate.read_pictures(a, 12, 12), generate.read_pictures(b, 12, 12), strict=True)
    return max(float((x[1] - y[1]).abs().max()) for x, y in pairs)


def watch_writes(run: Path, report: Callable[[str, str], None]) -> None:
    """Report every path below `run` that this process opens for writing, makes, moves or removes from now on."""
    import safetensors.torch

    def check(event: str, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike) and Path(os.fsdecode(path)).is_relative_to(run):
            report(event, str(Path(os.fsdecode(path)).relative_to(run)))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            check(event, args[0])
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
            check(event, args[0])
        elif event == "os.rename":
            check(event, args[0])
            check(event, args[1])

    real = safetensors.torch.save_file  # opens its file in Rust, without an event

    def save_file(tensors: Any, filename: Any, *more: Any, **named: Any) -> None:
        check("save_file", filename)
        real(tensors, filename, *more, **named)

    safetensors.torch.save_file = save_file
    sys.addaudithook(hook)


def run(folder: Path, steps: int, faults: int, tally: Tally) -> None:
    chance = random.Random(1)
    with timed("equal numbers"):
        for name in ("dpo", "rankdpo", *METHODS) if steps else ():
            equal(folder / "equal", name, steps, tally)
        for name in METHODS if steps else ():
            equal(folder / "equal", name, steps, tally, double=True)
        if steps:
            shards(folder, tally)
    with timed("not finite"):
        not_finite(folder, faults, chance, tally)
        if faults:
            not_finite_online(folder / "online", chance, tally)
            in_a_row(folder / "row", tally)
    with timed("out of memory"):
        if faults:
            short_of_memory(folder / "memory", tally)
