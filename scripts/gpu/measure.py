"""Runs a training command in this process and measures it: rows, seconds a step, peak memory, operations."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion_align import cli
from diffusion_align.train import record

Row = dict[str, Any]


@dataclass
class Measured:
    """Results of a command: `seconds` of each timed step, `peak` bytes since the first of them, `flops` of the second
    step (0 if not counted)."""

    code: int
    stderr: str
    rows: list[Row] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    flops: int = 0

    def require(self) -> Measured:
        """Itself; raises RuntimeError with the command's error line if it failed."""
        if self.code:
            lines = [line for line in self.stderr.splitlines() if "error:" in line] or self.stderr.splitlines()[-1:]
            raise RuntimeError(f"exit code {self.code}: {' '.join(lines)}")
        return self


def train(
    argv: Sequence[str], device: str, *, count: bool = False, after: Callable[[Row], None] = lambda row: None
) -> Measured:
    """Run `train ...`, whatever its exit code. `count` counts the operations of the second step, which is then not
    timed, because counting slows it. `after` is called with each row of metrics."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    found, times = Measured(0, ""), []
    counter = FlopCounterMode(display=False)
    counting = contextlib.ExitStack()

    def recorder(path: Path) -> Callable[[Row], None]:
        def write(row: Row) -> None:
            _wait(device)
            record.append(path, row)
            found.rows.append(row)
            times.append(time.perf_counter())
            if len(found.rows) == 1:
                reset_peak(device)
                if count:
                    counting.enter_context(counter)
            elif len(found.rows) == 2 and count:
                counting.close()
                found.flops = counter.get_total_flops()
                reset_peak(device)  # counting keeps more
                times[-1] = time.perf_counter()
            after(row)

        return write

    stderr, real = io.StringIO(), record.recorder
    record.recorder = recorder
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr), counting:
            found.code = cli.main(list(argv))
    finally:
        record.recorder = real
    found.stderr = stderr.getvalue()
    found.seconds = [b - a for a, b in zip(times[count:], times[count + 1 :], strict=False)]
    found.peak = peak(device)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Count peak memory from here on: the allocator's on CUDA, this process's resident memory elsewhere."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Peak bytes since `reset_peak`; 0 if the system does not report them."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def matmul_peak(device: str, dtype: torch.dtype, side: int, repeats: int) -> float:
    """Operations a second of a square matrix product, the best of five times `repeats`."""
    source = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=source).to(device, dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 * repeats / best


@contextlib.contextmanager
def memory_for(rows: int) -> Iterator[None]:
    """Make the network raise the allocator's out-of-memory error for more than `rows` rows, as memory itself cannot be
    limited everywhere."""
    from diffusion_align.models import TextToImage

    real = TextToImage.predict

    def predict(self: Any, x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and len(x) > rows:
            raise torch.OutOfMemoryError(f"simulated: {len(x)} rows where {rows} fit")
        return real(self, x, *rest, **more)

    TextToImage.predict = predict  # type: ignore[method-assign]
    try:
        yield
    finally:
        TextToImage.predict = real  # type: ignore[method-assign]


def fresh(folder: Path) -> Path:
    """Delete the folder of an earlier run."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def rows_of(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
