"""Memory of the gradient of a whole trajectory: two passes (`path_gradient`) against plain autograd.

    python scripts/bench_memory.py                             # the embedded model, or a toy if it is not built
    python scripts/bench_memory.py --model toy --steps 5 50    # a small network of tanh layers
    python scripts/bench_memory.py --model path/to/folder --guidance 5

Prints a table of the peak size of tensors that autograd keeps for the backward pass, each storage counted once.
Weights, their gradients and the trajectory are needed either way and are not counted, nor is the one clean prediction
per step that `path_gradient` keeps.
"""

from __future__ import annotations

import argparse
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from diffusion_align import rng
from diffusion_align.models.analytic import ToyDenoiser
from diffusion_align.prediction import Denoiser
from diffusion_align.samplers import path_gradient, replay, rollout, step_table
from diffusion_align.schedule import Schedule


class _Held:
    """A tensor saved for backward; autograd deletes this box when it no longer needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def peak_saved_bytes(work: Callable[[], object], besides: Iterable[Tensor] = ()) -> int:
    """The peak of bytes that autograd kept for backward during `work()`, without the storages of `besides`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    holders: Counter[int] = Counter()
    now = peak = 0

    def release(place: int, size: int) -> None:
        nonlocal now
        holders[place] -= 1
        now -= 0 if holders[place] else size

    def pack(tensor: Tensor) -> _Held:
        nonlocal now, peak
        held, storage = _Held(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in known:
            now += 0 if holders[place] else size
            holders[place] += 1
            peak = max(peak, now)
            weakref.finalize(held, release, place, size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        work()
    return peak


def _toy(batch: int) -> tuple[nn.Module, Denoiser, Schedule, tuple[int, ...]]:
    network = ToyDenoiser(64, rng.generator(0, "weights"), hidden=1024, layers=3)
    return network, network, Schedule.from_config({}), (batch, 64)


def _model(name: str, batch: int, guidance: float) -> tuple[nn.Module, Denoiser, Schedule, tuple[int, ...]]:
    from diffusion_align.models import load_pipeline

    model = load_pipeline(name)
    model.unet.requires_grad_(True)
    text = model.encode_text(["a small red circle on a gray background"] * batch)
    return model.unet, model.denoiser(text, guidance), model.schedule, (batch, *model.latent_shape())


def _loss(log_prob: Tensor) -> Tensor:
    """Not linear, so that every step's gradient depends on all the others."""
    return log_prob.sum(0).square().mean()


def main(argv: Sequence[str] | None = None) -> list[tuple[int, int, int]]:
    """Print the table and return its rows: steps, peak bytes of two passes, peak bytes of plain autograd."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help='"toy", or what load_pipeline takes; default: "tiny" if it is built, else "toy"'
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=1.0, help="of a model; the toy has none")
    args = parser.parse_args(argv)
    name = args.model or _default_model()
    setting = _toy(args.batch) if name == "toy" else _model(name, args.batch, args.guidance)
    network, denoiser, schedule, shape = setting
    start = rng.normal(shape, 0, "start").to(next(network.parameters()).device)
    print(f"{name}, batch {args.batch}: peak MiB saved for backward\n")
    print("| steps | two passes | plain autograd | ratio |\n|---|---|---|---|")
    rows = []
    for steps in args.steps:
        run = rollout(denoiser, step_table(schedule, steps), start, rng.generator(0, "run"))
        besides = [*network.parameters(), run.states, *([] if run.clean is None else [run.clean])]
        passes = peak_saved_bytes(lambda: path_gradient(denoiser, run, _loss), besides)  # noqa: B023
        network.zero_grad()
        plain = peak_saved_bytes(lambda: _loss(replay(denoiser, run)).backward(), besides)  # noqa: B023
        network.zero_grad()
        rows.append((steps, passes, plain))
        print(f"| {steps} | {passes / 2**20:.2f} | {plain / 2**20:.2f} | {plain / passes:.1f} |", flush=True)
    return rows


def _default_model() -> str:
    from diffusion_align.models.hub import asset

    try:
        asset("tiny")
    except FileNotFoundError:
        return "toy"
    return "tiny"


if __name__ == "__main__":
    main()
