"""Jobs of 2 and 4 processes in which one dies, fails, stalls, sees other data, or gets a signal.

    python tests/stress/processes.py [--jobs 100] [--signals 40] [--torchrun 4]

- faults: each job ends within 60 s and names rank and cause, or goes on where it should; its last checkpoint loads,
  and a run resumed from it ends, bit for bit, as one without a fault
- signals to one process or all, at random moments: all exit with 128 + n at the same step, and the resumed run ends
  with the same bits
- rank 1 writes nothing in the run folder but its own notes and its own data of a round
- the checks of `equal.py`
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of `stress` and of the tests' helpers

import torch
from helpers_machine import free_port

from diffusion_align.train.checkpoints import store as checkpoint
from stress import equal
from stress.jobs import LIMIT, Ended, Fault, Tally, command, launch, timed
from stress.runs import STEPS, differences, end_of, flags, make_world, stop_at, train

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
QUICK = 60.0  # seconds within which a job must end, on a machine that does nothing else
PATIENCE = 60.0  # seconds that a process has to stop after a signal
# kind, what the process is doing, methods; and the message about rank {r}, or None if the job must go on.
CASES: tuple[tuple[str, str, tuple[str, ...], str | None], ...] = (
    ("kill", "learning", ("dpo", "d3po", "prdp", "spo", "rankdpo"), r"rank {r} at step \d+ \(learning\) is gone"),
    ("kill", "drawing", ("d3po", "spo"), r"rank {r} at step \d+ \(drawing\) is gone"),
    ("loss", "learning", ("dpo", "rankdpo", "prdp"), r"rank {r} at step \d+ \(learning\): the loss was made to fail"),
    ("reward", "scoring", ("d3po", "prdp"), r"rank {r} at step \d+ \(scoring\): the reward failed: .*was made to fail"),
    ("rows", "encoding", ("dpo",), r"rank {r} at step 0 \(encoding\): 3 of 10 rows are bad"),
    ("rows", "reading", ("dpo",), r"rank {r}: exit code 1\n(.*\n)*.*error: 3 of 10 rows are bad"),
    ("stall", "learning", ("dpo",), r"rank {r} has not moved since step \d+ \(learning\), \d+ s ago"),
    ("stall", "scoring", ("d3po",), r"rank {r} has not moved since step \d+ \(scoring\), \d+ s ago"),
    ("ties", "scoring", ("d3po", "prdp"), None),
    ("disk", "saving", ("dpo", "d3po"), None),
)  # fmt: skip


def job(world: Path, method: str, run: Path, count: int) -> list[str]:
    """A command line whose steps are the same on 1, 2 and 4 processes."""
    more = ["--process_timeout=300", "--checkpointing_steps=2"]
    if method in ("dpo", "rankdpo"):
        return flags(world, method, run, *more, f"--train_batch_size={4 // count}", "--gradient_accumulation_steps=1")
    return flags(world, method, run, *more, f"--prompts_per_step={max(2, count)}")


def undisturbed(world: Path, method: str, count: int) -> Path:
    """The folder of a job of `count` processes without a fault, which is made once."""
    run = world / f"whole-{method}-{count}"
    if not run.exists():
        ended = launch(count, command(job(world, method, run, count)), world / "log")
        if any(ended.codes):
            raise RuntimeError(f"{method} on {count} processes: {ended.codes} {ended.text}")
    return run


def resumed_differs(world: Path, run: Path, method: str, count: int) -> list[str]:
    """Resume a job to its end; return what differs from the undisturbed job."""
    ended = launch(count, command([*job(world, method, run, count), "--resume=auto"]), world / "log")
    if any(ended.codes):
        return [f"the resumed job ends with {ended.codes}: {ended.text[-500:]}"]
    return [f"{what} differs" for what in differences(run, end_of(undisturbed(world, method, count)))]


def told(ended: Ended) -> str:
    """What a user sees: the output of all processes, and the launcher's line for each."""
    lines = [
        f"rank {rank}: exit code {code}\n{said}"
        for rank, (code, said) in enumerate(zip(ended.codes, ended.said, strict=True))
    ]
    return "\n".join(lines)


def hurt(world: Path, number: int, chance: random.Random, tally: Tally, compare: bool) -> None:
    """One job with the next kind of fault, method and number of processes."""
    kind, doing, methods, said = CASES[number % len(CASES)]
    method, count = methods[number // len(CASES) % len(methods)], (2, 2, 4)[number % 3]
    rank = 0 if kind == "disk" else chance.randrange(count)
    if doing in ("encoding", "reading"):
        rank = max(rank, 1) if doing == "encoding" else rank
    fault = Fault(kind, rank, chance.randint(3, 9), doing)
    run = world / f"hurt-{number}"
    # Only a stall needs a short timeout, as the others wait for it.
    limit = ["--process_timeout=10"] if kind == "stall" else []
    ended = launch(count, command([*job(world, method, run, count), *limit], fault), world / "log")
    problems = ["it hung"] if ended.hung else []
    if said is None:
        problems += [f"exit codes {ended.codes}"] if any(ended.codes) else []
    else:
        problems += [] if all(ended.codes) else [f"exit codes {ended.codes}"]
        problems += (
            [] if re.search(said.format(r=rank), told(ended)) else [f"rank {rank} is not named: {told(ended)[-900:]}"]
        )
    problems += checkpoints(run)
    if compare and kind != "ties" and not problems:
        problems += resumed_differs(world, run, method, count)
    tally.check(
        f"fault: {kind} ({doing})", [f"{method}, {count} processes, {fault}: {p}" for p in problems], ended.seconds
    )
    shutil.rmtree(run, ignore_errors=True)


def checkpoints(run: Path) -> list[str]:
    """What is wrong with the newest checkpoint, if any."""
    try:
        checkpoint.latest_good(run / "checkpoints")
    except checkpoint.CheckpointError as error:
        return [str(error)]
    return []


def no_part(world: Path, method: str, tally: Tally, compare: bool = True) -> None:
    """Stop in the middle of a round whose data rank 1 cannot write; the job resumes from the checkpoint before."""
    run = world / "part"

    def work(rank: int) -> int:
        argv = job(world, method, run, 2)
        if rank == 1:
            return command(argv, Fault("part", 1))(rank)
        code, said = train(argv, stop_at(6))
        print(said, file=sys.stderr)
        return code

    ended = launch(2, work, world / "log", patience=PATIENCE)
    problems = [] if ended.codes == [143, 143] else [f"exit codes {ended.codes}"]
    problems += [] if "step 6 could not be saved" in ended.text else [f"it says {ended.text[-400:]}"]
    problems += [*checkpoints(run), *(resumed_differs(world, run, method, 2) if compare else [])]
    tally.check("fault: data of a round", problems, ended.seconds)
    shutil.rmtree(run, ignore_errors=True)


def signalled(world: Path, number: int, chance: random.Random, tally: Tally) -> None:
    """One job with a signal to one process or to all, at a random moment of training."""
    method, sent = ("d3po", "dpo", "prdp", "rankdpo", "spo")[number % 5], SIGNALS[number % 3]
    run, to_all = world / f"signal-{number}", chance.random() < 0.5
    rank, delay = chance.randrange(2), chance.uniform(0, 2.0)

    def meanwhile(children: list[int]) -> None:
        while not (run / "metrics.jsonl").exists() and not any(map(has_ended, children)):
            time.sleep(0.005)
        time.sleep(delay)
        for child in children if to_all else [children[rank]]:
            os.kill(child, sent)

    ended = launch(2, command(job(world, method, run, 2)), world / "log", meanwhile, patience=PATIENCE)
    found = checkpoint.latest_good(run / "checkpoints")
    state, last = found.state["progress"] if found else {}, rows(run)
    done = bool(last == STEPS and ended.codes == [0, 0] or set(ended.codes) <= {0, -sent} and last == STEPS)
    problems = [] if done or set(ended.codes) == {128 + sent} else [f"exit codes {ended.codes}: {ended.text[-500:]}"]
    problems += (
        []
        if found is not None and found.step == last
        else [f"step {last} was the last, saved is {found and found.step}"]
    )
    where = "after the last step" if done else "in a round" if state.get("in_round") else "between rounds or steps"
    name = f"signal {where}"
    tally.check(
        name,
        [
            f"{method} {sent.name} {'all' if to_all else rank}: {p}"
            for p in problems or resumed_differs(world, run, method, 2)
        ],
        ended.seconds,
    )
    shutil.rmtree(run, ignore_errors=True)


def has_ended(child: int) -> bool:
    """Whether a child has ended; a later wait still gets its exit code."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def rows(run: Path) -> int:
    """The step of the last row of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def writers(world: Path, method: str, tally: Tally) -> None:
    """Everything that rank 1 opens for writing, makes, moves or removes in the run folder."""
    run, log = world / "writers", world / "written.txt"

    def work(rank: int) -> int:
        argv = job(world, method, run, 2)
        if rank == 0:
            return train(argv, stop_at(6))[0]
        with log.open("w") as file:
            equal.watch_writes(run, lambda event, path: print(event, path, file=file, flush=True))
            return train(argv)[0]

    launch(2, work, world / "log", patience=PATIENCE)
    own = re.compile(r"(\.|\.ranks(/rank-1)?|checkpoints|checkpoints/\.part-round_1\..*)$")
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    foreign = sorted({f"{event} {path}" for event, path in lines if not own.match(path)})
    problems = [f"process 1 touched {what}" for what in foreign]
    if (
        not any("rank-1" in path for _, path in lines)
        or method != "dpo"
        and not any(".part-" in path for _, path in lines)
    ):
        problems.append("not even its own files were seen")
    tally.check("writers", problems)
    shutil.rmtree(run, ignore_errors=True)


def torchrun(world: Path, kind: str, tally: Tally) -> None:
    """A job started by torchrun; `kind` says what happens to which of its processes."""
    run, begun = world / f"torchrun-{kind}", time.monotonic()
    script = Path(__file__).resolve().parents[2] / "scripts" / "finetune.py"
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
        str(script),
        "dpo",
    ]
    argv = [*job(world, "dpo", run, 2)[2:], "--max_train_steps=4000", "--lr_scheduler=constant"]
    process = subprocess.Popen([*words, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (run / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    workers = sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    hit = {"kill": workers[1], "signal": workers[1], "stall": workers[1], "launcher": process.pid}[kind]
    sent = time.monotonic()
    os.kill(hit, {"kill": signal.SIGKILL, "stall": signal.SIGSTOP}.get(kind, signal.SIGTERM))
    text = process.communicate(timeout=LIMIT)[0]
    waited = time.monotonic() - sent
    want = {
        "kill": "is gone",
        "stall": "has not moved since",
        "signal": "is saved; continue with",
        "launcher": "is saved; continue with",
    }[kind]
    said = text.split("Traceback")[0][-1500:]
    problems = [] if want in text else [f"it says {said}"]
    problems += ["exit code 0"] if process.returncode == 0 else []
    tally.check(f"torchrun {kind}", [*problems, *checkpoints(run)], waited)
    print(f"  torchrun {kind}: {waited:.1f} s to the end, {sent - begun:.1f} s to the first step")
    shutil.rmtree(run, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100, help="with a fault")
    parser.add_argument("--compare", type=int, default=3, help="one in so many of them is resumed to its end")
    parser.add_argument("--signals", type=int, default=40, help="jobs with a signal")
    parser.add_argument("--torchrun", type=int, default=4, help="real launches")
    parser.add_argument("--steps", type=int, default=50, help="of the runs on 1, 2 and 4 processes")
    parser.add_argument("--faults", type=int, default=100, help="numbers that are not finite")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(argv)
    torch.set_num_threads(1)
    chance, tally, begun = random.Random(o.seed), Tally(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        with timed("faults"):
            for number in range(o.jobs):
                hurt(world, number, chance, tally, number % o.compare == 0)
                if number % 20 == 19:
                    print(f"  {number + 1} jobs, {len(tally.wrong)} wrong", flush=True)
            for method in ("d3po", "spo") if o.jobs else ():
                no_part(world, method, tally)
        with timed("signals"):
            for number in range(o.signals):
                signalled(world, number, chance, tally)
        with timed("writers"):
            for method in ("dpo", "d3po") if o.jobs else ():
                writers(world, method, tally)
        for kind in ("kill", "signal", "stall", "launcher")[: o.torchrun]:
            torchrun(world, kind, tally)
        equal.run(Path(folder), o.steps, o.faults, tally)
    for name, count in sorted(tally.tried.items()):
        print(f"{name}: {count}")
    if tally.slowest > QUICK:
        tally.wrong.append(f"the slowest job took {tally.slowest:.0f} s, more than {QUICK:.0f}")
    print("\n".join(f"WRONG {line}" for line in tally.wrong))
    count, slowest, took = sum(tally.tried.values()), tally.slowest, time.monotonic() - begun
    print(f"{count} checks, {len(tally.wrong)} wrong; the slowest job {slowest:.0f} s; {took:.0f} s in all")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
