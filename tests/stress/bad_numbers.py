"""Training steps with numbers that are not finite, or in which memory runs out.

    python tests/stress/bad_numbers.py [--steps 100]

- nan or inf in a loss, a gradient, a latent or a reward: exactly those steps are skipped and counted, the weights stay
  finite, and a resumed run keeps the count; a reward that fails costs its picture, not the step
- gradient norms of 50 standard deviations: with --skip_spikes exactly those are skipped, also after a resumption
- memory that runs out in forward, backward, drawing or scoring: the same samples, and losses within 1e-5

The networks are the tests' toys; the loops are those of the commands.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `stress` and of the tests' helpers

import torch
from helpers_memory import FullOnTheWayBack, Limited, short_of_memory
from helpers_online import METHODS, Toy, darkness
from helpers_train import MemoryPairs, make_run

from diffusion_align.methods.shared.pair_losses import PairLoss
from diffusion_align.train.run import Progress, StepRecord

BAD = (float("nan"), float("inf"), -float("inf"))
AT_ONCE = 50  # steps of a run


def bad_steps(chance: random.Random, count: int, steps: int = AT_ONCE) -> set[int]:
    """Random steps to be spoilt, never 4 in a row, because 5 end a run."""
    found: set[int] = set()
    while len(found) < count:
        step = chance.randint(1, steps)
        if not any({step - i + j for j in range(4)} - {step} <= found for i in range(4)):
            found.add(step)
    return found


class Spoilt:
    """A network whose first row of output, or of its gradient, is `value` while `when()` is true."""

    def __init__(self, network: Any, when: Callable[[], bool], value: float, back: bool = False):
        self.network, self.when, self.value, self.back = network, when, value, back

    def __call__(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        out = self.network(x, t, text)
        if not self.when():
            return out
        if self.back:
            if out.requires_grad:
                out.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), self.value))
            return out
        return out.index_fill(0, torch.tensor([0]), self.value)


def all_finite(parameters: Any, optimizer: torch.optim.Optimizer) -> bool:
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return all(bool(tensor.isfinite().all()) for tensor in (*parameters, *moments))


def outcome(records: Iterator[StepRecord], spoilt: set[int], finite: Callable[[], bool], what: str) -> list[str]:
    """Consume a run's records; return what is wrong."""
    wrong = []
    for record in records:
        if record.updated == (record.step in spoilt):
            wrong.append(f"{what}: step {record.step} was {'taken' if record.updated else 'skipped'}")
        if record.metrics["skipped"] != sum(step <= record.step for step in spoilt):
            wrong.append(f"{what}: {record.metrics['skipped']} counted at step {record.step}")
        if not finite():
            wrong.append(f"{what}: a weight is not finite after step {record.step}")
    return wrong


def offline(kind: str, spoilt: set[int], value: float) -> list[str]:
    """A DPO run with a loss, gradient or latent spoilt at these steps; stopped and resumed half-way."""
    run = make_run(cache=MemoryPairs(20), max_steps=AT_ONCE, total=AT_ONCE)
    at = [0]

    def now() -> bool:
        return at[0] + 1 in spoilt

    class Latents(MemoryPairs):
        def batch(self, indices: Any, variants: Any = None) -> Any:
            latents, text = super().batch(indices, variants)
            return (latents.index_fill(0, torch.tensor([1]), value) if kind == "latent" and now() else latents), text

    plain = run.settings["loss"]
    changes = {
        "cache": Latents(20),
        "predict_policy": Spoilt(run.network, lambda: kind == "gradient" and now(), value, back=True),
        "loss": PairLoss(lambda pairs: plain(pairs) + (value if kind == "loss" and now() else 0.0)),
    }

    def stepping(progress: Progress | None, most: int) -> Iterator[StepRecord]:
        for record in run.steps(progress, **changes, max_steps=most):
            yield record
            at[0] = record.step

    def both() -> Iterator[StepRecord]:
        last = None
        for last in stepping(None, AT_ONCE // 2):
            yield last
        assert last is not None
        yield from stepping(last.progress, AT_ONCE)

    return outcome(both(), spoilt, lambda: all_finite(run.parameters.values(), run.optimizer), f"dpo, {kind}, {value}")


def online(name: str, kind: str, spoilt: set[int], value: float) -> list[str]:
    """Rounds of one step, in which a reward, or the policy's output while drawing or learning, is spoilt."""
    at = [0]

    def now() -> bool:
        return at[0] + 1 in spoilt

    def reward(latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        values = darkness(latents, prompts).nan_to_num(0.0, 0.0, 0.0)  # pictures are always finite
        return values.index_fill(0, torch.tensor([0]), value) if kind == "reward" and now() else values

    toy: Any = Toy(reward=reward, share=False)
    toy.optimizer.param_groups[0]["lr"] = 1e-3

    def while_learning(learns: bool) -> bool:
        return now() and torch.is_grad_enabled() == learns

    toy.policy_calls.network = Spoilt(
        Spoilt(toy.network, lambda: kind == "latent" and while_learning(False), value),
        lambda: kind in ("loss", "gradient") and while_learning(True),
        value,
        back=kind == "gradient",
    )

    def stepping() -> Iterator[StepRecord]:
        for record in toy.rounds(toy.method(name), max_steps=AT_ONCE):
            yield record
            at[0] = record.step

    # SPO makes no pair of a branch that is not finite; with other methods it is in the graph of the others.
    skipped = set() if kind == "reward" or (name, kind) == ("spo", "latent") else spoilt
    return outcome(stepping(), skipped, lambda: all_finite(toy.parameters, toy.optimizer), f"{name}, {kind}, {value}")


def spikes(spoilt: set[int]) -> list[str]:
    """Gradients 50 deviations too large, after enough steps to know the usual norm; a resumed run remembers it."""
    spoilt = {step for step in spoilt if step > 20}
    run, at = make_run(cache=MemoryPairs(20), max_steps=AT_ONCE, total=AT_ONCE, warmup=0), [0]
    norms: list[float] = []

    def policy(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        out = run.network(x, t, text)
        if out.requires_grad and at[0] + 1 in spoilt:
            out.register_hook(lambda gradient: gradient * 1e4)
        return out

    def both() -> Iterator[StepRecord]:
        progress = None
        for most in (AT_ONCE // 2, AT_ONCE):
            for record in run.steps(progress, predict_policy=policy, max_steps=most, spike=20.0):
                yield record
                norms.append(record.metrics["grad_norm"])
                at[0], progress = record.step, record.progress

    return outcome(both(), spoilt, lambda: all_finite(run.parameters.values(), run.optimizer), "spikes")


def short_offline(way: str, rows: int, after: int, seed: int) -> list[str]:
    """A DPO run whose memory holds only `rows` rows from a certain call on, compared with one that has enough."""
    whole, cut = (make_run(cache=MemoryPairs(20), batch_size=8, max_steps=12, warmup=0, seed=seed) for _ in range(2))
    changes: dict[str, Any] = {}
    if way == "forward":
        changes = {"predict_policy": Limited(cut.network, rows, after)}
    elif way == "backward":
        changes = {"predict_policy": lambda x, t, text: FullOnTheWayBack.apply(cut.network(x, t, text), rows)}
    else:
        cut.reference = Limited(cut.reference, rows, after)
    return compared(list(whole.steps()), list(cut.steps(**changes)), f"dpo, {way}, {rows} rows")


def short_online(name: str, place: str, seed: int) -> list[str]:
    """Rounds of four prompts, where memory holds the pictures of two."""
    whole, cut = Toy(double=True, seed=seed), Toy(double=True, seed=seed)
    short_of_memory(cut, name, place)
    enough, short = (list(toy.rounds(toy.method(name), prompts_per_chunk=4, max_steps=4)) for toy in (whole, cut))
    return compared(enough, short, f"{name}, {place}")


def compared(whole: list[StepRecord], cut: list[StepRecord], what: str) -> list[str]:
    """Differences between a run that ran out of memory and one that did not; or that it did not run out."""
    wrong = [] if cut[-1].progress.halvings else [f"{what}: memory did not run out"]
    for a, b in zip(whole, cut, strict=True):
        if a.progress.samples != b.progress.samples:
            wrong.append(f"{what}: other samples at step {a.step}")
        if not abs(a.loss - b.loss) <= 1e-5 * abs(a.loss):
            wrong.append(f"{what}: loss {b.loss} at step {a.step}, not {a.loss}")
    return wrong


def report(wrong: list[str], said: str) -> int:
    print(f"{said}: {len(wrong)} wrong", flush=True)
    for text in wrong[:10]:
        print(f"    {text}")
    return len(wrong)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="spoilt steps of each kind and method")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="online methods beside DPO")
    args = parser.parse_args(argv)
    chance, failures = random.Random(0), 0
    each, rounds = min(10, args.steps), -(-args.steps // 10)
    for kind in ("loss", "gradient", "latent"):
        wrong = [text for i in range(rounds) for text in offline(kind, bad_steps(chance, each), BAD[i % 3])]
        failures += report(wrong, f"dpo, {rounds * each} steps with a {kind} that is not finite")
    for name, kind in itertools.product(args.methods, ("loss", "gradient", "latent", "reward")):
        some = max(1, rounds // 4)
        wrong = [text for i in range(some) for text in online(name, kind, bad_steps(chance, each), BAD[i % 3])]
        failures += report(wrong, f"{name}, {some * each} steps with a {kind} that is not finite")
    wrong = [text for _ in range(rounds) for text in spikes(bad_steps(chance, each))]
    failures += report(wrong, f"{rounds} runs with spikes")
    for way in ("forward", "backward", "reference"):
        wrong = [text for i in range(rounds) for text in short_offline(way, 2 + 2 * (i % 4), chance.randrange(8), i)]
        failures += report(wrong, f"dpo, {rounds} runs in which memory runs out ({way})")
    for name, place in itertools.product(args.methods, ("drawing", "scoring", "learning")):
        some = max(1, rounds // 4)
        wrong = [text for i in range(some) for text in short_online(name, place, i)]
        failures += report(wrong, f"{name}, {some} runs in which memory runs out while {place}")
    return int(failures > 0)


if __name__ == "__main__":
    # Not in `main`, which the tests call: they go on in the same process.
    logging.getLogger("diffusion_align").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    sys.exit(main())
