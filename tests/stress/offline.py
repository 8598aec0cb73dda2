"""Local commands without a network: attempts to connect, and the time to the first step of training.

    python tests/stress/offline.py [--repeats 3] [--strace]

Each is tried with HF_HUB_OFFLINE=1, and with a proxy that nobody answers. One process imports every module and runs the
commands on the embedded model; Python's sockets are guarded, so an attempt to connect is counted and refused. --strace
also counts those of compiled code. Times to the first step are compared with those of an unguarded process.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLACK_HOLE = "http://127.0.0.1:9"
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "HF_HUB_OFFLINE=1": {"HF_HUB_OFFLINE": "1"},
    "a proxy that nobody answers": {
        name: BLACK_HOLE
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    },
}
ONLINE: dict[str, str] = {}
SLACK = 5.0  # seconds that the first step may come later


def guard(attempts: list[str]) -> None:
    """Count and refuse every attempt of this process to connect, except to Unix sockets."""

    def refuse(what: str, error: Callable[..., OSError]) -> Callable[..., Any]:
        def refused(*args: Any, **options: Any) -> Any:
            attempts.append(f"{what} {args[1:] if isinstance(args[0], socket.socket) else args}"[:200])
            raise error(f"{what} is guarded")

        return refused

    def guarded(name: str) -> None:
        plain, refused = getattr(socket.socket, name), refuse(name, ConnectionRefusedError)

        def act(self: socket.socket, *args: Any) -> Any:
            return plain(self, *args) if self.family == socket.AF_UNIX else refused(self, *args)

        setattr(socket.socket, name, act)

    for name in ("connect", "connect_ex", "sendto", "sendmsg"):
        guarded(name)
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr"):
        setattr(socket, name, refuse(name, socket.gaierror))


def commands(folder: Path) -> dict[str, list[str]]:
    """Small runs of the commands on the embedded model and rewards."""
    run, small = folder / "run", ["--steps", "2", "--device", "cpu"]
    train = """--max_train_steps 1 --learning_rate 1e-4 --device cpu --validation_sampling_steps 1
        --validation_prompt circle --model tiny""".split()
    return {
        "data inspect": ["data", "inspect", str(folder / "pairs.parquet")],
        "train dpo": ["train", "dpo", *train, "--train_data_dir", str(folder / "pairs.parquet"),
                      "--output_dir", str(run), "--cache_dir", str(folder / "cache")],
        "sample": ["sample", "--run", str(run), "--prompt", "a red circle", "--out", str(folder / "drawn"), *small],
        "reward score": ["reward", "score", "--reward", "tiny", "--images", str(folder / "drawn"),
                         "--out", str(folder / "scores"), "--device", "cpu"],
        "evaluate": ["evaluate", str(run), "--num_prompts", "4", *small],
        "train d3po": ["train", "d3po", *train, "--reward", "tiny", "--output_dir", str(folder / "d3po"),
                       "--steps", "2", "--order", "2", "--prompts", "tiny", "--prompts_per_round", "1",
                       "--sample_chunk", "2", "--num_prompts", "2"],
    }  # fmt: skip


def import_all() -> int:
    """Import every module of the package; return how many there are."""
    import diffusion_align

    names = [found.name for found in pkgutil.walk_packages(diffusion_align.__path__, "diffusion_align.")]
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    return len(names)


def make_pairs(folder: Path) -> None:
    import torch

    from diffusion_align.data import write_pairs_parquet
    from diffusion_align.data.images import encode_png
    from diffusion_align.shapes import sample_captions

    source, captions = torch.Generator().manual_seed(0), sample_captions(4, 0, unique=True)
    left, right = ([encode_png(torch.rand(3, 64, 64, generator=source)) for _ in captions] for _ in range(2))
    write_pairs_parquet(folder / "pairs.parquet", captions, left, right, [1.0, 0.0, 1.0, 0.0])


def child(folder: Path, guarded: bool, only: str | None) -> dict[str, Any]:
    """Run the commands in this process; return exit codes, attempts, and the seconds to the first row of metrics."""
    begun, attempts = time.monotonic(), []
    if guarded:
        guard(attempts)
    modules = 0 if only else import_all()
    from diffusion_align import cli
    from diffusion_align.train import record

    make_pairs(folder)
    first: list[float] = []
    append: Callable[..., None] = record.append

    def noted(*args: Any) -> None:
        append(*args)
        first.append(time.monotonic() - begun)

    record.append = noted  # pyright: ignore[reportAttributeAccessIssue]
    wanted = {name: argv for name, argv in commands(folder).items() if only in (None, name)}
    codes = {name: cli.main(argv) for name, argv in wanted.items()}
    return {"modules": modules, "codes": codes, "attempts": attempts, "first": first[0] if first else None}


def in_process(
    folder: Path, environment: dict[str, str], *, guarded: bool = True, only: str | None = None, strace: bool = False
) -> dict[str, Any]:
    """`child` in a new process with this environment and no other settings of the network."""
    folder.mkdir(parents=True)
    keep = {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and not key.startswith("HF_")}
    keep["HF_HOME"] = str(folder / "hub")  # an empty cache, so that this machine's own does not help
    out, trace = folder / "told.json", folder / "trace"
    argv = [sys.executable, __file__, "--child", str(out), *(["--guarded"] if guarded else [])]
    argv += ["--only", only] if only else []
    if strace:
        argv = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(trace), *argv]
    done = subprocess.run(argv, env={**keep, **environment}, capture_output=True, text=True, cwd=folder)
    if not out.exists():
        raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr[-2000:]}")
    told = json.loads(out.read_text())
    if strace:
        told["attempts"] += re.findall(r".*AF_INET6?.*", trace.read_text())
    return told | {"stderr": done.stderr}


def check(folder: Path, repeats: int, strace: bool) -> int:
    """Print attempts and times of each environment; return how many went wrong."""
    bad = 0
    for number, (name, environment) in enumerate(ENVIRONMENTS.items()):
        told = in_process(folder / f"all {number}", environment, strace=strace)
        failed = [command for command, code in told["codes"].items() if code]
        bad += len(failed) + len(told["attempts"])
        if failed:
            print("\n".join(line for line in told["stderr"].splitlines() if "error:" in line))
        print(f"{name}: {told['modules']} modules and {len(told['codes'])} commands, {len(failed)} failed, "
              f"{len(told['attempts'])} attempts to connect {told['attempts'][:3] or ''}", flush=True)  # fmt: skip
    times: dict[str, list[float]] = {"network as it is": [], **{name: [] for name in ENVIRONMENTS}}
    for repeat in range(repeats):
        for number, (name, found) in enumerate(times.items()):
            place = folder / f"{repeat} {number}"
            told = in_process(place, ENVIRONMENTS.get(name, ONLINE), guarded=number > 0, only="train dpo")
            found.append(told["first"])
    if not repeats:
        return bad
    usual, *dead = (sorted(found)[len(found) // 2] for found in times.values())
    for name, found in times.items():
        print(f"first step of train dpo, {name}: {', '.join(f'{seconds:.1f}' for seconds in found)} s")
    late = max(dead) - usual
    print(f"with a dead network the first step is {late:+.1f} s later (medians of {repeats})")
    return bad + (late > SLACK)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of each timed start")
    parser.add_argument("--strace", action="store_true", help="count the system calls too, where strace is installed")
    for name in ("--child", "--only"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--guarded", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        out = Path(args.child)
        out.write_text(json.dumps(child(out.parent, args.guarded, args.only)))
        return 0
    if args.strace and not shutil.which("strace"):
        parser.error("strace is not installed")
    with tempfile.TemporaryDirectory() as name:
        bad = check(Path(name), args.repeats, args.strace)
    print(f"{bad} went wrong")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
