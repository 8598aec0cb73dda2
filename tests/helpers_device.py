"""A device that has no float64, as Apple's MPS, made of the CPU.

Its tensors say that they lie elsewhere. As on a real device they hold no float64, do not compute together with tensors
of the CPU (single numbers apart), and come to numpy by way of the CPU only. Names of real devices cannot be used, as
torch would look for the device itself.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("ipu:0")  # of a kind that torch knows by name alone
# May take indices that lie on the CPU, as everywhere in torch.
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
CROSSING = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(torch.Tensor):
    """A tensor of the stand-in, around one of the CPU."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a tensor of this device to {inner.dtype}: it has no such numbers")
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip
        made.inner = inner
        return made

    @property
    def device(self):
        return DEVICE

    def __repr__(self):
        return f"Elsewhere({self.inner})"

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of this device to numpy: copy it to the CPU first")

    def new_tensor(self, data, dtype=None):
        return torch.tensor(data, dtype=dtype or self.dtype).to(DEVICE)

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    # torch's own code has made one on the device that it takes this for: the stand-in must learn that way in.
    assert not any(x.is_meta and not isinstance(x, Elsewhere) for x in tensors), f"{function}: a tensor without data"
    asked = kwargs.get("device")
    if asked is None:
        wanted = bool(there)
    else:
        # The stand-in's tensors are "meta" to torch's own code, as in `x.to(other)`.
        wanted = torch.device(asked).type in (DEVICE.type, "meta")
        kwargs = kwargs | {"device": torch.device("cpu")}
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim > 0]
    if there and here and function not in CROSSING and not (function in INDEXING and isinstance(args[0], Elsewhere)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} got {DEVICE} and cpu")
    if function is torch.ops.aten.copy_.default:
        wanted = isinstance(args[0], Elsewhere)
    plain = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = function(*plain[0], **plain[1])
    if function is torch.ops.aten._local_scalar_dense.default:
        return out
    same = {id(x.inner): x for x in there}  # what an operation in place gives back is what it was given

    def wrapped(x):
        if not wanted or not isinstance(x, torch.Tensor):
            return x
        return same[id(x)] if id(x) in same else Elsewhere(x)

    return tree_map(wrapped, out)


@contextmanager
def without_float64():
    """Within, `.to(DEVICE)` and `device=DEVICE` lead to the stand-in."""
    torch.ipu = torch.cpu  # what torch.utils.checkpoint asks about a device
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=DEVICE) is seen
    try:
        with _Mode():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        del torch.ipu


def move(module: nn.Module) -> nn.Module:
    """A module with its parameters and buffers on the stand-in; trainable ones stay so."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(parameter.detach().to(DEVICE), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(DEVICE)
    return module


class There:
    """An accelerator of one process whose device is the stand-in."""

    def __init__(self, accelerator):
        self.accelerator, self.device = accelerator, DEVICE

    def __getattr__(self, name):
        return getattr(self.accelerator, name)
