"""All methods on the same base model, held-out prompts and machine: a row for each method and seed, and a table.

    python scripts/shootout.py                                  # everything; hours on two CPU cores
    python scripts/shootout.py --methods d3po prdp --seeds 0    # some rows
    python scripts/shootout.py --table                          # only print the tables of finished rows

Finished rows are not run again, and interrupted training is resumed, so the work can be spread over many sessions.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

# The command of each row.
ROWS = {
    "dpo": "train dpo --preset tiny",
    "rankdpo": "train rankdpo --preset tiny",
    "d3po": "train d3po --preset tiny",
    "spo": "train spo --preset tiny",
    "prdp": "train prdp --preset tiny",
    "ddpo": "train ddpo --preset tiny",
    # The same noise levels of the window, in 10 steps of SDE-DPM-Solver++ and in 20 of the papers' sampler, which the
    # faster one must match.
    "d3po-dpmpp10": "train d3po --preset tiny --steps 10 --window_first 2 --window_last 5",
    "d3po-ddim20": "train d3po --preset tiny --solver ddim --steps 20 --window_first 4 --window_last 10",
    "prdp-dpmpp10": "train prdp --preset tiny --steps 10 --window_first 2 --window_last 5",
    "prdp-ddim20": "train prdp --preset tiny --solver ddim --steps 20 --window_first 4 --window_last 10",
    # Controls, which must not improve.
    "d3po-random": "train d3po --preset tiny --reward random",
    "prdp-random": "train prdp --preset tiny --reward random",
}
EVALUATION = "--steps 10 --guidance 1 --seed 0 --sampler dpmpp --features none --num_prompts"


def run_row(name: str, seed: int, out: Path, num_prompts: int, more: list[str]) -> dict:
    """Train and evaluate one row, and write the results."""
    from diffusion_align.cli import main as command

    run = out / f"{name}-{seed}"
    train = f"{ROWS[name]} --seed {seed} --resume_from_checkpoint auto".split() + ["--output_dir", str(run), *more]
    clock = run.with_suffix(".seconds")  # of all sessions; a killed one is not counted
    start = time.monotonic()
    try:
        if not list(run.glob("pytorch_lora_weights.safetensors")) and (code := command(train)):
            raise SystemExit(code)
    finally:
        spent = (float(clock.read_text()) if clock.exists() else 0.0) + time.monotonic() - start
        clock.parent.mkdir(parents=True, exist_ok=True)
        clock.write_text(f"{spent}\n")
    minutes = spent / 60
    if code := command(["evaluate", str(run), *EVALUATION.split(), str(num_prompts)]):
        raise SystemExit(code)
    report = json.loads((run / "report.json").read_text())
    judge, reward = report["metrics"]["judge/all"], report["metrics"]["reward"]
    gap = report["reward_gap"]["reward"]["judge/all"]
    row = {
        "row": name,
        "seed": seed,
        "n": judge["n"],
        "judge": [judge["base"], judge["tuned"], judge["difference"], judge["low"], judge["high"]],
        "reward": [reward["base"], reward["tuned"], reward["difference"]],
        "gap": [gap["reward_gain"], gap["agreement"]],
        "diversity": [diversity(run, side) for side in ("base", "tuned")],
        "kl": last_kl(run),
        "evaluations": network_evaluations(train),
        "minutes": minutes,
    }
    (out / f"{name}-{seed}.json").write_text(json.dumps(row) + "\n")
    return row


def diversity(run: Path, side: str) -> float:
    """Mean root-mean-square distance of two pictures of one prompt; held-out prompts repeat."""
    from diffusion_align.evaluation import read_picture

    folder = max((run / "evaluation").glob(f"{side}-*"), key=lambda path: path.stat().st_mtime) / "dpmpp"
    prompts = json.loads((folder / "pictures.json").read_text())["prompts"]
    where: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        where.setdefault(prompt, []).append(i)
    apart = []
    for rows in where.values():
        pictures = [read_picture(folder, i).flatten() for i in rows[:4]]
        apart += [(a - b).square().mean().sqrt() for i, a in enumerate(pictures) for b in pictures[:i]]
    return float(torch.stack(apart).mean())


def last_kl(run: Path) -> float | None:
    """KL from the reference in nats (for SPO, of a step), mean over the last five steps; None if it is not logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-5:]
    known = [row.get("kl", row.get("kl_w")) for row in rows]
    return None if None in known else sum(known) / len(known)


def network_evaluations(argv: list[str]) -> int:
    """Forward passes of the whole training, from its options: rollout, policy and reference, with or without gradient;
    for SPO as if every pair were kept."""
    from diffusion_align.commands.train.plan import about_run
    from diffusion_align.options import VERBS, parse, resolve

    words = " ".join(argv[:2])
    verb = VERBS[words]
    parsed = parse(verb.options, argv[2:], words)
    o = resolve(verb.options, words, preset=parsed.preset, settings=parsed.settings).options
    length = verb.entry().length(o, about_run(verb.entry(), o))
    if length.evaluations is not None:
        return length.evaluations
    pictures = 2 if words == "train dpo" else 4
    return (o.max_train_steps or 0) * o.train_batch_size * (o.gradient_accumulation_steps or 1) * pictures * 2


def table(out: Path) -> str:
    """The finished rows in the order of ROWS, as Markdown.

    reward: the gain of the training reward, also in deviations of the base's pictures. agrees: of the pictures whose
    verdict by the judge changed, the fraction whose reward moved the same way. KL: in nats, see `last_kl`.
    """
    names = "method, seed, judge (base), tuned, difference, 95 % interval, reward, agrees, diversity, KL, evaluations"
    lines = ["| " + names.replace(", ", " | ") + " | minutes |", "|" + "---|" * 12]
    found = [json.loads(path.read_text()) for path in out.glob("*.json")]
    for row in sorted(found, key=lambda r: (list(ROWS).index(r["row"]), r["seed"])):
        base, tuned, difference, low, high = (100 * v for v in row["judge"])
        before, after = row["diversity"]
        kl = "" if row["kl"] is None else f"{row['kl']:.1f}"
        cells = [
            row["row"],
            str(row["seed"]),
            f"{base:.1f} %",
            f"{tuned:.1f} %",
            f"{difference:+.1f}",
            f"{low:+.1f} to {high:+.1f}",
            f"{row['reward'][2]:+.3f} = {row['gap'][0]:+.2f} sd",
            f"{100 * row['gap'][1]:.0f} %",
            f"{before:.3f} to {after:.3f}",
            kl,
            f"{row['evaluations']:,}",
            f"{row['minutes']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(out: Path) -> str:
    """A row for each method, with its seeds side by side."""
    lines = ["| method | seeds | right before | right after | gain | intervals above 0 | minutes |", "|" + "---|" * 7]
    found = [json.loads(path.read_text()) for path in out.glob("*.json")]
    for name in ROWS:
        rows = sorted((row for row in found if row["row"] == name), key=lambda row: row["seed"])
        if rows:
            base, tuned = ([f"{100 * row['judge'][i]:.1f}" for row in rows] for i in range(2))
            gain = [f"{100 * row['judge'][2]:+.1f}" for row in rows]
            above = sum(row["judge"][3] > 0 for row in rows)
            minutes = max(row["minutes"] for row in rows)
            cells = [name, ", ".join(str(row["seed"]) for row in rows), f"{base[0]} %", f"{', '.join(tuned)} %"]
            cells += [", ".join(gain), f"{above} of {len(rows)}", f"{minutes:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/shootout"))
    parser.add_argument("--num_prompts", type=int, default=500, help="held-out prompts to measure on")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    args, more = parser.parse_known_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for seed in args.seeds:
            for name in args.methods:
                if not (args.out / f"{name}-{seed}.json").exists():
                    run_row(name, seed, args.out, args.num_prompts, more)
    print(table(args.out) + "\n\n" + summary(args.out))


if __name__ == "__main__":
    main()
