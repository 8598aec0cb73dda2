"""The build's training loop: warm-up and cosine decay, clipping, averaged weights; resumable at any step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm


def fit(
    name: str,
    folder: Path,
    modules: Mapping[str, nn.Module],
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 100,
    average: float = 0.999,
    save_every: int = 200,
) -> None:
    """Train `modules` on `loss_at(step)` and leave the averaged weights in them.

    All randomness is inside `loss_at`, addressed by the step, so a run that was cut off goes on as if it had not been.
    `average` is the decay of the exponential moving average of the weights, ramped up over the first steps.
    """
    parameters = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    averaged = {key: p.detach().clone() for key, p in parameters.items()}
    state_file = folder / f"{name}-state.safetensors"
    start = _load(state_file, parameters, averaged, optimizer) if state_file.exists() else 0

    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=2.0)
    for step in bar:
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / warmup) * max(decay, 1e-3)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate = min(average, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.values()), list(parameters.values()), 1 - rate)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % save_every == 0:
            _save(state_file, step + 1, parameters, averaged, optimizer)
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(averaged[key])
    for module in modules.values():
        module.eval()


def _save(path: Path, step: int, parameters: dict, averaged: dict, optimizer: torch.optim.AdamW) -> None:
    tensors = {"step": torch.tensor(step)}
    for key, p in parameters.items():
        tensors |= {f"weight/{key}": p.detach(), f"average/{key}": averaged[key]}
        tensors |= {f"optimizer/{slot}/{key}": value for slot, value in optimizer.state[p].items()}
    staged = path.with_suffix(".tmp")
    save_file({key: t.clone().contiguous() for key, t in tensors.items()}, staged)
    staged.replace(path)  # a kill leaves the old state or the new one


def _load(path: Path, parameters: dict, averaged: dict, optimizer: torch.optim.AdamW) -> int:
    tensors = load_file(path)
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(tensors[f"weight/{key}"])
            averaged[key].copy_(tensors[f"average/{key}"])
            optimizer.state[p] = {
                slot: tensors[f"optimizer/{slot}/{key}"] for slot in ("step", "exp_avg", "exp_avg_sq")
            }
    return int(tensors["step"])
