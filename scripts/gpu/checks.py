"""The GPU checks, one function each. A check returns a row of facts, or raises an error of one line."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_align.evaluation.report import versions

from .commands import Scale, at_size, embedded, make_data, work_of
from .measure import Row, fresh, matmul_peak, memory_for, reset_peak, rows_of, train
from .random_models import make_model

Facts = dict[str, Any]
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest relative difference between the CPU in float32 and the device. Float32 sums in another order; bf16 and fp16
# round each product to 8 and 11 bits. Online methods draw other pictures in another precision, so only their loss
# before the first update is compared, which depends little on the pictures.
LOSS = {"no": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
GRADIENT = {"no": 2e-2, "bf16": 1e-1, "fp16": 5e-2}


@dataclass(frozen=True)
class Setting:
    """The device and the sizes: `models` are the names in `random_models` for SD1.5 and SDXL, with resolution and
    batch; `half` are the precisions besides float32."""

    device: str
    work: Path
    smoke: bool
    models: dict[str, tuple[str, int, int]]
    half: tuple[str, ...]
    scale: Scale

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


def about(s: Setting) -> Facts:
    """Versions and the card."""
    facts: Facts = {"versions": versions(), "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    if s.cuda:
        card = torch.cuda.get_device_properties(s.device)
        facts |= {"card": card.name, "memory_gb": card.total_memory / 2**30, "capability": f"{card.major}.{card.minor}"}
    facts["result"] = facts.get("card", "CPU")
    return facts


def matrix_peak(s: Setting) -> Facts:
    """Operations a second of a large matrix product in each precision, TF32 off."""
    side, repeats = (512, 1) if s.smoke else (8192, 10) if s.cuda else (2048, 1)
    torch.backends.cuda.matmul.allow_tf32 = False
    rates = {name: matmul_peak(s.device, PRECISIONS[name], side, repeats) for name in ("no", *s.half)}
    return {"rates": rates, "result": ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items())}


def parity(s: Setting, method: str) -> Facts:
    """Two steps on the CPU in float32 and on the device in each precision: the start check passes, numbers agree."""

    def rows(device: str, precision: str) -> list[Row]:
        run = fresh(s.work / f"parity-{method}-{device}-{precision}")
        return train(embedded(method, run, device, precision, s.scale), device).require().rows

    wanted, facts, worst = rows("cpu", "no"), {}, []
    for precision in ("no", *s.half):
        found = rows(s.device, precision)
        comparable = precision == "no" or method in ("dpo", "rankdpo")
        off = {name: _relative(found[0][name], wanted[0][name]) for name in ("loss", "grad_norm")}
        off["second loss"] = _relative(found[1]["loss"], wanted[1]["loss"])
        facts[precision] = off
        worst.append(f"{precision} {off['loss']:.1e}/{off['grad_norm']:.1e}")
        if not all(math.isfinite(row["loss"]) for row in found):
            raise RuntimeError(f"{method} in {precision}: the loss is not finite")
        if comparable and (off["loss"] > LOSS[precision] or off["grad_norm"] > GRADIENT[precision]):
            raise RuntimeError(f"{method} in {precision} differs from the CPU: loss and gradient norm by {off}")
    return {"relative": facts, "result": "loss/gradient off by " + ", ".join(worst)}


def _relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / max(abs(wanted), 1e-6)


def resume(s: Setting, method: str) -> Facts:
    """Four steps, and the same stopped by a signal after two and resumed: weights and metrics have the same bits."""
    whole, cut = (fresh(s.work / f"resume-{method}-{name}") for name in ("whole", "cut"))
    train(embedded(method, whole, s.device, "no", s.scale, steps=4), s.device).require()

    def stop(row: Row) -> None:
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(embedded(method, cut, s.device, "no", s.scale, steps=4), s.device, after=stop)
    if stopped.code != 128 + signal.SIGTERM:
        raise RuntimeError(f"a signal ended the run with exit code {stopped.code}: {stopped.stderr[-200:]}")
    again = [*embedded(method, cut, s.device, "no", s.scale, steps=4), "--resume_from_checkpoint", "latest"]
    train(again, s.device).require()
    one, other = (_weights(run) for run in (whole, cut))
    apart = max(float((one[name] - other[name]).abs().max()) for name in one)
    same_rows = rows_of(whole) == rows_of(cut)
    if apart > 1e-3:
        raise RuntimeError(f"a resumed run ends {apart:.1e} from the one that was never stopped")
    same = apart == 0 and same_rows
    return {"apart": apart, "same_rows": same_rows, "result": "same bits" if same else f"weights {apart:.1e} apart"}


def _weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "pytorch_lora_weights.safetensors")


def out_of_memory(s: Setting, method: str) -> Facts:
    """Memory that runs out while learning: the run goes on with smaller micro-batches and the same numbers."""
    batch = 4 if s.smoke else 32
    words = embedded(method, fresh(s.work / f"memory-{method}-whole"), s.device, "no", s.scale, batch=batch)
    reset_peak(s.device)
    whole = train(words, s.device).require()
    words = embedded(method, fresh(s.work / f"memory-{method}-cut"), s.device, "no", s.scale, batch=batch)
    if s.cuda:
        total = torch.cuda.get_device_properties(s.device).total_memory
        idle = torch.cuda.memory_allocated()
        torch.cuda.set_per_process_memory_fraction((idle + 0.6 * (whole.peak - idle)) / total)
        try:
            cut = train(words, s.device).require()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        # Half the rows of a learning pass: two a pair, and online the one state of a prompt that trajectories share.
        with memory_for(batch if method == "dpo" else s.scale.prompts):
            cut = train(words, s.device).require()
    halvings = max(row.get("halvings", 0) for row in cut.rows)
    if not halvings:
        raise RuntimeError("memory did not run out: nothing was checked")
    off = _relative(cut.rows[0]["loss"], whole.rows[0]["loss"])
    if off > LOSS["no"]:
        raise RuntimeError(f"the loss changed by {off:.1e} when its pieces were halved")
    how = "for real" if s.cuda else "simulated"
    return {"halvings": halvings, "loss": off, "result": f"{how}: halved {halvings:g} times, loss off by {off:.1e}"}


def step(s: Setting, family: str, method: str, rate: float) -> Facts:
    """A measured step of a method on a random model of real size; `rate` is the card's peak in this precision."""
    size, resolution, batch = s.models[family]
    model, data = s.work / size, s.work / f"data-{resolution}"
    if not (model / "model_index.json").is_file():
        make_model(size, model, s.device)
    if not data.exists():
        make_data(data, resolution, s.scale.pictures)
    precision = s.half[0] if s.cuda else "no"
    run = fresh(s.work / f"step-{family}-{method}")
    words = at_size(method, model, data, run, s.device, precision, resolution, batch, s.scale)
    # On a CPU, counting operations at this size takes 3 GB more than the step.
    found = train(words, s.device, count=s.cuda or s.smoke).require()
    seconds = sum(found.seconds) / len(found.seconds)
    amount, unit = work_of(method, batch, s.scale)
    fresh(run)  # weights of this size are not kept
    return {
        "seconds": seconds, "peak_gb": found.peak / 2**30, "tflop": found.flops / 1e12,
        "share": found.flops / seconds / rate if rate else 0.0, "precision": precision, "resolution": resolution,
        "batch": batch, "result": f"{amount / seconds:.3g} {unit} a second",
    }  # fmt: skip
