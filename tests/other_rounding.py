"""A processor that rounds otherwise: `ROUNDING=1 pytest tests/...`, and with 2, 3, ... another one.

Sums, products of matrices, convolutions and norms come out up to two ulps off, by place and by the shapes that went in,
as kernels that take another order of summation for another size make them; exp, tanh and their like come out up to one
ulp off, by value. The same call with the same shapes rounds the same way twice. What is exact on every processor, such
as a sum of small whole numbers, stays exact. A test that fails under it hangs on the processor it was written on.
"""

import os
import threading
import zlib
from functools import lru_cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SEED = int(os.environ["ROUNDING"])
ULPS = 2
SUMS = """mm addmm bmm baddbmm dot mv addmv convolution convolution_backward sum mean var std var_mean cumsum logsumexp
    linalg_vector_norm native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
    _softmax _log_softmax _softmax_backward_data _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention_for_cpu_backward _upsample_bicubic2d_aa upsample_bilinear2d""".split()
CURVES = """exp expm1 log log1p tanh sigmoid sin cos erf gelu silu softplus log_sigmoid_forward rsqrt pow tanh_backward
    sigmoid_backward silu_backward gelu_backward softplus_backward log_sigmoid_backward""".split()


def overloads(names):
    packets = [getattr(torch.ops.aten, name) for name in names]
    return {op for packet in packets for op in (getattr(packet, name) for name in packet.overloads())}


@lru_cache(maxsize=300)
def by_place(key, shape, dtype):
    source = torch.Generator().manual_seed(zlib.crc32(f"{SEED} {key}".encode()))
    return 1 + torch.randint(-1, 2, shape, generator=source).to(dtype) * (ULPS * torch.finfo(dtype).eps)


def digits(out):
    """The mantissa without its exponent: a power of two in front of everything changes no rounding."""
    single = out.dtype == torch.float32
    return out.view(torch.int32 if single else torch.int64) & (2 ** (23 if single else 52) - 1)


def by_value(out):
    return 1 + (((digits(out) * 2654435761 + SEED * 7919) >> 7) % 3 - 1).to(out.dtype) * torch.finfo(out.dtype).eps


def is_exact(out):
    """Whether it has few digits, as sums of small whole numbers have."""
    return digits(out) & (2 ** (12 if out.dtype == torch.float32 else 41) - 1) == 0


class OtherRounding(TorchDispatchMode):
    sums, curves = overloads(SUMS), overloads(CURVES)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in self.sums and func not in self.curves or func._schema.is_mutable:
            return result
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        for place, out in enumerate(tree_leaves(result)):
            if not isinstance(out, torch.Tensor) or out.dtype not in (torch.float32, torch.float64):
                continue
            if out.numel() and out.device.type == "cpu":
                factor = (
                    by_value(out) if func in self.curves else by_place((func, *shapes, place), out.shape, out.dtype)
                )
                out.mul_(torch.where(is_exact(out), 1.0, factor))
        return result


_mode, _run = OtherRounding(), threading.Thread.run


def _run_in_mode(thread):
    with OtherRounding():  # a mode is of one thread
        _run(thread)


def pytest_sessionstart(session):
    threading.Thread.run = _run_in_mode
    _mode.__enter__()


def pytest_sessionfinish(session):
    _mode.__exit__(None, None, None)
    threading.Thread.run = _run
