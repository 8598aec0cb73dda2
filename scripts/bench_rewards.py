"""How many pictures a second rewards score, where the time goes, and what decoding in the background saves.

    python scripts/bench_rewards.py                                     # those that need no download
    python scripts/bench_rewards.py --rewards pickscore hpsv2.1 --side 512
    python scripts/bench_rewards.py --seeded ViT-B-32 ViT-H-14          # the cost of an architecture, random weights

Prints a table, a row a reward: pictures a second, milliseconds a picture in open_clip's preprocessing and in all the
rest (mostly the network), and pictures a second from PNG bytes, decoded in turn and decoded ahead (`prefetch`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diffusion_align import rng
from diffusion_align.data.images import decode_image, encode_png, to_square
from diffusion_align.rewards import Reward, load_reward, prefetch, to_uint8
from diffusion_align.rewards.clip import Clip, clip_of, cosine_scorer, open_clip_model
from diffusion_align.rewards.weights import place_of
from diffusion_align.shapes import sample_captions

NO_DOWNLOAD = ("tiny", "jpeg-small", "judge", "random")


def seeded_clip(architecture: str, device: torch.device) -> Clip:
    """An architecture of open_clip with random weights, in float32: as slow as the real one."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise SystemExit(f"open_clip has no architecture {architecture}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = open_clip.CLIP(**config).state_dict()
    return clip_of(architecture, weights, source=architecture, device=device)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The least of `repeats` runs, after one to warm up: what disturbs a run only ever adds."""
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
            some = [to_square(decode_image(data), side) for data in files[i : i + batch]]
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="*", default=list(NO_DOWNLOAD), help="as for --reward of the command")
    parser.add_argument("--seeded", nargs="*", default=[], help="open_clip architectures with random weights")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=16, help="pictures decoded at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=None)
    args = parser.parse_args(argv)
    place = place_of(args.device)
    images = rng.normal((args.pictures, 3, args.side, args.side), 0, "bench pictures").mul(0.2).add(0.5).clamp(0, 1)
    prompts = sample_captions(args.pictures, 0)  # the judge reads no others
    print(f"{args.pictures} pictures of {args.side} x {args.side} on {place}, {torch.get_num_threads()} threads")
    columns = ("pictures/s", "prepare ms", "rest ms", "PNG/s", "PNG/s ahead")
    print(f"{'reward':20} " + " ".join(f"{name:>10}" for name in columns))
    for name in args.rewards:
        clip = open_clip_model("tiny", device=place) if name == "tiny" else None
        reward = cosine_scorer(clip) if clip is not None else load_reward(name, device=place)
        print(row(name, reward, clip, images, prompts, args.batch, args.repeats), flush=True)
    for name in args.seeded:
        clip = seeded_clip(name, place)
        print(row(name, cosine_scorer(clip), clip, images, prompts, args.batch, args.repeats), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
