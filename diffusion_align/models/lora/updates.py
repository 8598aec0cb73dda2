"""New weights from the tensors of an adapter's layer: exact dense arithmetic, as the programs that made them do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """One layer of an adapter. `parts` are float32; `scale` is alpha / rank; `keys` are their names in the file."""

    kind: str
    parts: dict[str, Tensor]
    scale: float
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The kind in words that people know."""
        if "mid" in self.parts:
            kind = "LoCon (Tucker)"
        else:
            kind = "BOFT" if self.kind == "OFT" and self.parts["oft_blocks"].ndim == 4 else self.kind
        if self.decomposed:
            return "DoRA" if kind == "LoRA" else f"DoRA of {kind}"
        return kind

    def weight(self, old: Tensor) -> Tensor:
        """The layer's new weight, float32. Raises RuntimeError or ValueError if the shapes do not fit."""
        if self.kind == "full difference" and "diff" not in self.parts:
            return old
        new = _NEW[self.kind](old, self.parts, self.scale)
        if new.shape != old.shape:
            raise ValueError(f"the update is {list(new.shape)}")
        return _decomposed(new, self.parts) if self.decomposed else new

    @property
    def decomposed(self) -> bool:
        """Whether a magnitude scales the weight's direction (DoRA)."""
        return "magnitude" in self.parts or "dora_scale" in self.parts

    def magnitude_of_outputs(self) -> Tensor | None:
        """DoRA's magnitudes [out]; None if they are of the inputs."""
        if "magnitude" in self.parts:
            return self.parts["magnitude"].flatten()
        scale = self.parts["dora_scale"]
        return None if len(scale) == 1 != len(self.parts["up"]) else scale.flatten()

    def bias(self, old: Tensor | None) -> Tensor | None:
        """The layer's new bias, float32. Raises ValueError if it has none, or one of another size."""
        change = self.parts.get("diff_b", self.parts.get("b_norm"))
        if change is None:
            return old
        if old is None or old.numel() != change.numel():
            raise ValueError(f"the bias is {None if old is None else list(old.shape)}")
        return old + change.view_as(old)


def low_rank(parts: Parts) -> Tensor:
    """up x down, with the core of a Tucker decomposition between them if there is one: [out, in, ...]."""
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        return _tucker(parts["mid"], up.flatten(1).T, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


def _tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[r,r,...], [r,out], [r,in] -> [out,in,...]. einsum would repeat an axis of one, so the ranks are compared."""
    if core.shape[:2] != (len(rows), len(columns)):
        raise ValueError(f"the core is {list(core.shape)} between ranks {len(rows)} and {len(columns)}")
    return torch.einsum("ij...,ip,jq->pq...", core, rows, columns)


def _lora(old: Tensor, parts: Parts, scale: float) -> Tensor:
    return old + scale * low_rank(parts).view_as(old)


def _loha(old: Tensor, parts: Parts, scale: float) -> Tensor:
    product = None
    for side in ("1", "2"):
        first, second = parts[f"hada_w{side}_a"], parts[f"hada_w{side}_b"]
        core = parts.get(f"hada_t{side}")
        factor = first @ second if core is None else _tucker(core, first, second)
        product = factor if product is None else product * factor
    assert product is not None
    return old + scale * product.reshape(old.shape)


def _lokr(old: Tensor, parts: Parts, scale: float) -> Tensor:
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        second = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        second = _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        second = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return old + scale * torch.kron(first, second.contiguous()).reshape(old.shape)


def _difference(old: Tensor, parts: Parts, scale: float) -> Tensor:
    return old + parts["diff"].view_as(old)


def _norm(old: Tensor, parts: Parts, scale: float) -> Tensor:
    return old + parts["w_norm"].view_as(old)


def _ia3(old: Tensor, parts: Parts, scale: float) -> Tensor:
    axis = 1 if bool(parts["on_input"]) else 0
    _require_count("scales", parts["scales"], old.shape[axis])
    shape = [-1 if i == axis else 1 for i in range(old.ndim)]
    return old * (1 + parts["scales"].reshape(shape))


def _glora(old: Tensor, parts: Parts, scale: float) -> Tensor:
    a1, a2, b1, b2 = (parts[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if a1.shape != (old.shape[1], len(a2)) or a2.shape[1] != old.shape[1]:
        raise ValueError(f"a1 is {list(a1.shape)}, as in lycoris before version 2")
    right = torch.einsum("oi...,ij,jk->ok...", old, a1, a2)
    left = _tucker(parts["bm"], b1.T, b2) if "bm" in parts else (b1 @ b2).view_as(old)
    return old + scale * (right + left)


def _oft(old: Tensor, parts: Parts, scale: float) -> Tensor:
    """`scale` is the constraint: how far the rotations may go per output; 0 is no limit."""
    blocks = parts["oft_blocks"]
    _require_count("rows of the rotations", blocks[..., 0] if blocks.ndim == 3 else blocks[0, ..., 0], len(old))
    skew = blocks - blocks.transpose(-1, -2)
    limit, norm = scale * len(old), float(skew.norm()) + 1e-8
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    one = torch.eye(blocks.shape[-1], dtype=skew.dtype, device=skew.device)
    rotation = (one + skew) @ torch.linalg.inv(one - skew)
    new = _butterfly(old, rotation) if blocks.ndim == 4 else _diagonal(old, rotation)
    if "rescale" not in parts:
        return new
    _require_count("rescale", parts["rescale"], len(old))
    return new * parts["rescale"].view(-1, *[1] * (old.ndim - 1))


def _require_count(what: str, values: Tensor, due: int) -> None:
    """One number would be repeated, and too few reshaped."""
    if values.numel() != due:
        raise ValueError(f"{values.numel()} {what} for {due}")


def _diagonal(old: Tensor, rotation: Tensor) -> Tensor:
    rows = old.reshape(*rotation.shape[:2], -1)
    return torch.einsum("knm,knx->kmx", rotation, rows).reshape(old.shape)


def _butterfly(old: Tensor, rotation: Tensor) -> Tensor:
    """Stage i rotates groups of outputs that are 2^i half blocks apart."""
    stages, _, size, _ = rotation.shape
    rows = old.flatten(1)
    for i in range(stages):
        apart = 2**i * (size // 2)
        # Outputs (c, 2, apart) are regrouped as (c, apart, 2), so that those that belong together are neighbours.
        mixed = rows.reshape(-1, 2, apart, rows.shape[1]).transpose(1, 2).reshape(-1, size, rows.shape[1])
        mixed = torch.einsum("bij,bjx->bix", rotation[i], mixed)
        rows = mixed.reshape(-1, apart, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
    return rows.reshape(old.shape)


def _decomposed(new: Tensor, parts: Parts) -> Tensor:
    """The direction of `new` times a magnitude: one for each output or, in some files of dora_scale, each input."""
    if "magnitude" in parts:
        magnitude, axis = parts["magnitude"], 0
    else:
        magnitude = parts["dora_scale"]
        axis = 1 if len(magnitude) == 1 != len(new) else 0
    if magnitude.numel() != new.shape[axis]:
        raise ValueError(f"the magnitude is {list(magnitude.shape)}")
    norm = torch.linalg.vector_norm(new, dim=[i for i in range(new.ndim) if i != axis], keepdim=True)
    return new / norm * magnitude.reshape([-1 if i == axis else 1 for i in range(new.ndim)])


_NEW = {
    "LoRA": _lora,
    "LoHa": _loha,
    "LoKr": _lokr,
    "full difference": _difference,
    "norm difference": _norm,
    "IA3": _ia3,
    "GLoRA": _glora,
    "OFT": _oft,
}
