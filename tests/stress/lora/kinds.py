"""Files of every kind of adapter, made by hand, and the weights that they stand for, in float64.

The makers follow lycoris' shapes. The arithmetic is written out as matrices, in another way than the package does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_align.rng import generator

RANK, ALPHA = 3, 2.0
Parts = dict[str, Tensor]


class Dice:
    """Normal numbers of one layer."""

    def __init__(self, *address: Any):
        self.source = generator(0, *address)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.source) * 0.3


@dataclass(frozen=True)
class Kind:
    """`title`: as the package names it. `make`: (weight, dice) -> parts. `due`: (weight, parts) -> the new weight."""

    title: str
    make: Callable[[Tensor, Dice], Parts]
    due: Callable[[Tensor, Parts], Tensor]


def _lora(w: Tensor, dice: Dice) -> Parts:
    ones = [1] * (w.ndim - 2)
    return {
        "lora_down.weight": dice(RANK, *w.shape[1:]),
        "lora_up.weight": dice(len(w), RANK, *ones),
        "alpha": torch.tensor(ALPHA),
    }


def _lora_due(w: Tensor, p: Parts) -> Tensor:
    down, up = p["lora_down.weight"], p["lora_up.weight"].flatten(1)
    return w + float(p["alpha"]) / len(down) * torch.einsum("or,r...->o...", up, down).view(w.shape)


def _locon(w: Tensor, dice: Dice) -> Parts:
    if w.ndim == 2 or w.shape[-1] == 1:
        return _lora(w, dice)
    return {
        "lora_down.weight": dice(RANK, w.shape[1], 1, 1),
        "lora_mid.weight": dice(RANK, RANK, *w.shape[2:]),
        "lora_up.weight": dice(len(w), RANK, 1, 1),
        "alpha": torch.tensor(ALPHA),
    }


def _locon_due(w: Tensor, p: Parts) -> Tensor:
    if "lora_mid.weight" not in p:
        return _lora_due(w, p)
    new = w.clone()
    for y in range(w.shape[2]):
        for x in range(w.shape[3]):
            core = p["lora_mid.weight"][:, :, y, x]
            update = p["lora_up.weight"].flatten(1) @ core @ p["lora_down.weight"].flatten(1)
            new[:, :, y, x] += float(p["alpha"]) / RANK * update
    return new


def _loha(w: Tensor, dice: Dice) -> Parts:
    into = w[0].numel()
    return {
        **{f"hada_w{side}_a": dice(len(w), RANK) for side in "12"},
        **{f"hada_w{side}_b": dice(RANK, into) for side in "12"},
        "alpha": torch.tensor(ALPHA),
    }


def _loha_tucker(w: Tensor, dice: Dice) -> Parts:
    if w.ndim == 2 or w.shape[-1] == 1:
        return _loha(w, dice)
    return {
        **{f"hada_t{side}": dice(RANK, RANK, *w.shape[2:]) for side in "12"},
        **{f"hada_w{side}_a": dice(RANK, len(w)) for side in "12"},
        **{f"hada_w{side}_b": dice(RANK, w.shape[1]) for side in "12"},
        "alpha": torch.tensor(ALPHA),
    }


def _loha_due(w: Tensor, p: Parts) -> Tensor:
    if "hada_t1" not in p:
        product = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
        return w + float(p["alpha"]) / RANK * product.view(w.shape)
    new = w.clone()
    for y in range(w.shape[2]):
        for x in range(w.shape[3]):
            one, two = (p[f"hada_w{s}_a"].T @ p[f"hada_t{s}"][:, :, y, x] @ p[f"hada_w{s}_b"] for s in "12")
            new[:, :, y, x] += float(p["alpha"]) / RANK * one * two
    return new


def _lokr(first: bool, second: bool, tucker: bool = False) -> Callable[[Tensor, Dice], Parts]:
    """`first`, `second`: whether that factor of the Kronecker product is a matrix, and not a product itself."""

    def make(w: Tensor, dice: Dice) -> Parts:
        a, c = 2, 4
        b, d = len(w) // a, w.shape[1] // c
        kernel = w[0, 0].numel() if w.ndim > 2 else 1
        parts = {"lokr_w1": dice(a, c)} if first else {"lokr_w1_a": dice(a, RANK), "lokr_w1_b": dice(RANK, c)}
        if second:
            parts["lokr_w2"] = dice(b, d, *w.shape[2:])
        elif tucker and kernel > 1:
            parts |= {"lokr_t2": dice(RANK, RANK, *w.shape[2:]), "lokr_w2_a": dice(RANK, b), "lokr_w2_b": dice(RANK, d)}
        else:
            parts |= {"lokr_w2_a": dice(b, RANK), "lokr_w2_b": dice(RANK, d * kernel)}
        return parts | {"alpha": torch.tensor(ALPHA)}

    return make


def _lokr_due(w: Tensor, p: Parts) -> Tensor:
    first = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_t2" in p:
        second = torch.einsum("ijyx,ib,jd->bdyx", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        second = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
        second = second.reshape(len(w) // len(first), w.shape[1] // first.shape[1], -1)
    second = second.flatten(2)
    update = torch.einsum("ac,bdk->abcdk", first, second).reshape(w.shape)
    return w + (1.0 if {"lokr_w1", "lokr_w2"} <= p.keys() else float(p["alpha"]) / RANK) * update


def _with_dora(kind: Kind, per_input: bool = False) -> Kind:
    def make(w: Tensor, dice: Dice) -> Parts:
        ones = [1] * (w.ndim - 2)
        shape = [1, w.shape[1], *ones] if per_input else [len(w), 1, *ones]
        return kind.make(w, dice) | {"dora_scale": 1 + dice(*shape).abs()}

    def due(w: Tensor, p: Parts) -> Tensor:
        new = kind.due(w, p)
        for i in range(new.shape[per_input]):
            part = new[:, i] if per_input else new[i]
            part *= p["dora_scale"].flatten()[i] / part.square().sum().sqrt()
        return new

    return Kind("DoRA" if kind.title == "LoRA" else f"DoRA of {kind.title}", make, due)


def _ia3(on_input: int) -> Callable[[Tensor, Dice], Parts]:
    def make(w: Tensor, dice: Dice) -> Parts:
        width = w.shape[on_input]
        shape = [width] if w.ndim == 2 else [1, width, 1, 1]
        return {"weight": dice(*shape), "on_input": torch.tensor(on_input)}

    return make


def _ia3_due(w: Tensor, p: Parts) -> Tensor:
    scales = torch.diag(1 + p["weight"].flatten())
    return torch.einsum("oi...,ij->oj...", w, scales) if p["on_input"] else torch.einsum("po,oi...->pi...", scales, w)


def _glora(w: Tensor, dice: Dice) -> Parts:
    ones, into = [1] * (w.ndim - 2), w.shape[1]
    return {
        "a1.weight": dice(into, RANK, *ones),
        "a2.weight": dice(RANK, into, *ones),
        "b1.weight": dice(len(w), RANK, *ones),
        "b2.weight": dice(RANK, *w.shape[1:]),
        "alpha": torch.tensor(ALPHA),
    }


def _glora_due(w: Tensor, p: Parts) -> Tensor:
    right = p["a1.weight"].flatten(1) @ p["a2.weight"].flatten(1)
    left = torch.einsum("or,ri...->oi...", p["b1.weight"].flatten(1), p["b2.weight"])
    return w + float(p["alpha"]) / RANK * (torch.einsum("oi...,ij->oj...", w, right) + left)


def _oft(constraint: float, rescale: bool) -> Callable[[Tensor, Dice], Parts]:
    def make(w: Tensor, dice: Dice) -> Parts:
        parts = {"oft_blocks": dice(len(w) // 4, 4, 4), "alpha": torch.tensor(constraint)}
        return parts | ({"rescale": 1 + dice(len(w), *[1] * (w.ndim - 1))} if rescale else {})

    return make


def _rotations(w: Tensor, p: Parts) -> Tensor:
    skew = p["oft_blocks"] - p["oft_blocks"].transpose(-1, -2)
    limit, size = float(p["alpha"]) * len(w), float(skew.square().sum().sqrt())
    skew = skew * (limit / size if 0 < limit < size else 1)
    one = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return torch.linalg.solve(one - skew, one + skew, left=False)


def _rescaled(rows: Tensor, w: Tensor, p: Parts) -> Tensor:
    return rows.view(w.shape) * p.get("rescale", torch.ones(1, dtype=w.dtype))


def _oft_due(w: Tensor, p: Parts) -> Tensor:
    turn = torch.block_diag(*_rotations(w, p))
    return _rescaled(turn.T @ w.flatten(1), w, p)


def _boft(w: Tensor, dice: Dice) -> Parts:
    return {"oft_blocks": dice(3, len(w) // 4, 4, 4), "alpha": torch.tensor(0.0)}


def _boft_due(w: Tensor, p: Parts) -> Tensor:
    rows, out = w.flatten(1), torch.arange(len(w))
    for i, blocks in enumerate(_rotations(w, p)):
        k = 2**i * 2
        place = (out // (2 * k) * k + out % k) * 2 + out // k % 2  # of output (c, g, j) in the order (c, j, g)
        order = torch.zeros(len(w), len(w), dtype=w.dtype)
        order[place, out] = 1
        rows = order.T @ torch.block_diag(*blocks) @ order @ rows
    return _rescaled(rows, w, p)


LORA, LOHA = Kind("LoRA", _lora, _lora_due), Kind("LoHa", _loha, _loha_due)
LOKR = Kind("LoKr", _lokr(True, False), _lokr_due)
KINDS = {
    "LoRA": LORA,
    "LoCon, Tucker": Kind("LoCon (Tucker)", _locon, _locon_due),
    "LoHa": LOHA,
    "LoHa, Tucker": Kind("LoHa", _loha_tucker, _loha_due),
    "LoKr": LOKR,
    "LoKr, full": Kind("LoKr", _lokr(True, True), _lokr_due),
    "LoKr, both factored": Kind("LoKr", _lokr(False, False), _lokr_due),
    "LoKr, Tucker": Kind("LoKr", _lokr(True, False, tucker=True), _lokr_due),
    "DoRA": _with_dora(LORA),
    "DoRA per input": _with_dora(LORA, per_input=True),
    "DoRA of LoHa": _with_dora(LOHA),
    "DoRA of LoKr": _with_dora(LOKR),
    "full": Kind("full difference", lambda w, dice: {"diff": dice(*w.shape)}, lambda w, p: w + p["diff"]),
    "IA3": Kind("IA3", _ia3(0), _ia3_due),
    "IA3 on input": Kind("IA3", _ia3(1), _ia3_due),
    "GLoRA": Kind("GLoRA", _glora, _glora_due),
    "OFT": Kind("OFT", _oft(0.0, False), _oft_due),
    "OFT, constrained": Kind("OFT", _oft(0.001, True), _oft_due),
    "BOFT": Kind("BOFT", _boft, _boft_due),
}
