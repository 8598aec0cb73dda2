"""How many pictures a second rewards score, where the time goes, and what `prefetch` saves.

    python scripts/bench_rewards.py                                     # those that need no download
    python scripts/bench_rewards.py --rewards pickscore hpsv2.1 --side 512
    python scripts/bench_rewards.py --seeded ViT-B-32 ViT-H-14          # the cost of an architecture, random weights
    python scripts/bench_rewards.py --model OWNER/NAME --steps 20       # the loop with a model of your own

Prints two tables with a row for each reward. The first is scoring alone: pictures a second, milliseconds a picture in
open_clip's preprocessing and in the rest (mostly the network), and pictures a second from PNG bytes, decoded in turn
and in the background (`prefetch`). The second is a loop as in training that draws and scores chunks of pictures: the
fraction of time without drawing, if a chunk is scored before the next is drawn and if it is scored meanwhile, and the
speedup, as medians over pairs of runs. `slow` is a server on this machine that takes 50 ms a request.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.commands.reward.serve import Server
from diffusion_align.data.frames import Frame, fit
from diffusion_align.data.images import decode_image, encode_png
from diffusion_align.models import TextToImage, load_pipeline
from diffusion_align.options.reward import RewardServe
from diffusion_align.rewards import Reward, http_reward, load_reward, prefetch, to_uint8
from diffusion_align.rewards.clip import Clip, clip_of, cosine_scorer, open_clip_model, untrained_clip
from diffusion_align.rewards.interface import device_or_default
from diffusion_align.samplers import sample, step_table
from diffusion_align.shapes import sample_captions

NO_DOWNLOAD = ("tiny", "jpeg-small", "judge", "random")
SLOW = 0.05  # seconds a request

Chunk = tuple[Tensor, list[str]]


def seeded_clip(architecture: str, device: torch.device) -> Clip:
    """An architecture of open_clip with random weights, in float32; it has the cost of the real one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            weights = untrained_clip(architecture)[0].state_dict()
        except ValueError as error:
            raise SystemExit(str(error)) from error
    return clip_of(architecture, weights, source=architecture, device=device)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The minimum of `repeats` runs after a warm-up: disturbances only add time."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def row(
    name: str, reward: Reward, clip: Clip | None, images: Tensor, prompts: list[str], batch: int, repeats: int
) -> str:
    """One line of the table."""
    files, count = [encode_png(picture) for picture in images], len(images)
    side = images.shape[-1]

    def decoded() -> Iterator[tuple[Tensor, list[str]]]:
        for i in range(0, count, batch):
            some = [fit(decode_image(data), Frame(side, side)) for data in files[i : i + batch]]
            yield torch.stack(some), prompts[i : i + batch]

    def score_all(batches: Iterator[tuple[Tensor, list[str]]]) -> None:
        for some in batches:
            reward(*some)

    whole = seconds(lambda: reward(images, prompts), repeats)
    levels = to_uint8(images)
    prepare = seconds(lambda: clip.prepare(levels), repeats) if clip is not None else 0.0
    in_turn = seconds(lambda: score_all(decoded()), repeats)
    ahead = seconds(lambda: score_all(prefetch(decoded())), repeats)
    parts = f"{1000 * prepare / count:10.2f} {1000 * (whole - prepare) / count:10.2f}"
    return f"{name:20} {count / whole:10.1f} {parts} {count / in_turn:10.1f} {count / ahead:10.1f}"


def chunks_of(model: TextToImage, chunks: int, size: int, steps: int, busy: list[float]) -> Iterator[Chunk]:
    """Pictures and prompts, chunk after chunk; the seconds spent drawing each are appended to `busy`."""
    table = step_table(model.schedule, steps, solver="dpmpp", order=2, eta=0.0)
    prompts = sample_captions(size, 0)
    for chunk in range(chunks):
        start = time.perf_counter()
        with torch.no_grad():  # set in each thread
            noise = rng.normal((size, *model.latent_shape()), 0, "bench noise", chunk).to(model.device)
            pictures = model.decode(sample(model.denoiser(model.encode_text(prompts)), table, noise))
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        busy.append(time.perf_counter() - start)
        yield pictures, prompts


class Loop(NamedTuple):
    """Seconds of a loop over chunks, and the seconds without drawing."""

    seconds: float
    waited: float


def loop(make: Callable[[list[float]], Iterator[Chunk]], reward: Reward, *, behind: bool) -> Loop:
    """Draw and score chunks in turn, or score each while a thread draws the next."""
    busy: list[float] = []
    start = time.perf_counter()
    for pictures, prompts in prefetch(make(busy), ahead=1) if behind else make(busy):
        reward(pictures, prompts)
    whole = time.perf_counter() - start
    return Loop(whole, whole - sum(busy))


def overlap(make: Callable[[list[float]], Iterator[Chunk]], reward: Reward, repeats: int) -> tuple[float, float, float]:
    """Median fraction of waiting, in turn and one chunk behind, and median speedup, over pairs of runs."""
    loop(make, reward, behind=False)  # to warm up
    pairs = [(loop(make, reward, behind=False), loop(make, reward, behind=True)) for _ in range(repeats)]
    turn, behind = (median(run.waited / run.seconds for run in runs) for runs in zip(*pairs, strict=True))
    return turn, behind, median(a.seconds / b.seconds for a, b in pairs)


@contextmanager
def slow_server() -> Iterator[Reward]:
    """`reward serve` on this machine, with a reward that waits without using the processor."""

    def slow(pictures: Tensor, prompts: list[str]) -> Tensor:
        time.sleep(SLOW)
        return pictures.mean((1, 2, 3))

    with Server(RewardServe(reward="slow", port=0), reward=slow) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield http_reward(server.address)
        finally:
            server.shutdown()
            thread.join()


def print_overlap(rewards: Sequence[tuple[str, Reward]], model: TextToImage, args: argparse.Namespace) -> None:
    """Print the second table; its last row is the slow server."""
    print(f"\na loop of {args.chunks} chunks of {args.chunk} pictures, {args.steps} steps, {model.source}")
    print(f"{'reward':20} " + " ".join(f"{name:>15}" for name in ("waits, in turn", "waits, behind", "times as fast")))
    make = partial(chunks_of, model, args.chunks, args.chunk, args.steps)
    with slow_server() as slow:
        for name, reward in (*rewards, ("slow, over HTTP", slow)):
            turn, behind, gain = overlap(make, reward, args.repeats)
            print(f"{name:20} {turn:15.1%} {behind:15.1%} {gain:15.2f}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="*", default=list(NO_DOWNLOAD), help="as for --reward of the command")
    parser.add_argument("--seeded", nargs="*", default=[], help="open_clip architectures with random weights")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=16, help="pictures decoded at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="tiny", help="model that draws in the loop; none: no loop")
    parser.add_argument("--chunks", type=int, default=6, help="number of chunks in the loop")
    parser.add_argument("--chunk", type=int, default=8, help="pictures drawn, and scored, at a time")
    parser.add_argument("--steps", type=int, default=2, help="steps of the sampler")
    parser.add_argument("--device", default=None)
    args = parser.parse_args(argv)
    place = device_or_default(args.device)
    images = rng.normal((args.pictures, 3, args.side, args.side), 0, "bench pictures").mul(0.2).add(0.5).clamp(0, 1)
    prompts = sample_captions(args.pictures, 0)  # the judge reads no others
    print(f"{args.pictures} pictures of {args.side} x {args.side} on {place}, {torch.get_num_threads()} threads")
    columns = ("pictures/s", "prepare ms", "rest ms", "PNG/s", "PNG/s ahead")
    print(f"{'reward':20} " + " ".join(f"{name:>10}" for name in columns))
    known: list[tuple[str, Reward]] = []
    for name in args.rewards:
        clip = open_clip_model("tiny", device=place) if name == "tiny" else None
        reward = cosine_scorer(clip) if clip is not None else load_reward(name, device=place)
        known.append((name, reward))
        print(row(name, reward, clip, images, prompts, args.batch, args.repeats), flush=True)
    for name in args.seeded:
        clip = seeded_clip(name, place)
        reward = cosine_scorer(clip)
        known.append((name, reward))
        print(row(name, reward, clip, images, prompts, args.batch, args.repeats), flush=True)
    if args.model != "none":
        print_overlap(known, load_pipeline(args.model, device=str(place)), args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
