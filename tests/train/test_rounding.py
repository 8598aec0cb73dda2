"""Rounding that depends on the shape of a batch or on gradients, at Stable Diffusion's latent size and guidance.

A denoiser whose outputs carry a relative error of a given size, drawn anew for every batch size, stands for kernels
that round in another order.
"""

import math
import re
from functools import partial

import pytest
import torch
from helpers_memory import full
from helpers_online import EMPTY, METHODS, Toy
from helpers_train import SCHEDULE, MemoryPairs, Network, make_run, train_pairs, train_rankings

from diffusion_align import rng
from diffusion_align.commands.train.opening import set_tf32
from diffusion_align.gaussian import Gaussian
from diffusion_align.methods import dpo, rankdpo
from diffusion_align.methods.shared import start_checks
from diffusion_align.methods.shared.runs import binder
from diffusion_align.methods.shared.start_checks import FLOAT32, along_runs, arithmetic, between_outputs
from diffusion_align.objectives import gain_weights, rank_dpo
from diffusion_align.prediction import to_clean
from diffusion_align.samplers import step_gaussian

LATENTS = (4, 64, 64)
ERRORS = [("no", 1e-6), ("tf32", 1e-3), ("bf16", 1e-2)]


@pytest.fixture
def no_tf32():
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


class Rounding(torch.nn.Module):
    """The best noise prediction for standard normal data, plus an adapter that starts at zero; rounded by `error`.

    `by_gradient`: another error with gradients on. `dropout`: another one in every call, so large. `rows`: memory for
    so many with gradients on.
    """

    def __init__(self, error, *, by_gradient=False, dropout=0.0, rows=None):
        super().__init__()
        self.adapter = torch.nn.Parameter(torch.zeros(4, 1, 1))
        self.error, self.by_gradient, self.dropout, self.rows, self.calls = error, by_gradient, dropout, rows, 0

    def forward(self, x, t, text):
        if self.rows is not None and torch.is_grad_enabled() and len(x) > self.rows:
            full()
        out = x * (SCHEDULE.sigma(t).to(x)[:, None, None, None] + self.adapter)
        key = (len(x), int(self.by_gradient and torch.is_grad_enabled()))
        size = self.error
        if self.dropout:
            self.calls += 1
            key, size = (*key, self.calls), self.dropout
        noise = rng.normal_batch(x.shape[1:], 0, "rounding", [(*key, row) for row in range(len(x))])
        return out * (1 + size * noise)


class Latents(Toy):
    def __init__(self, error, **more):
        super().__init__(guidance=5.0, steps=4, group=2)
        self.shape, self.dims = LATENTS, math.prod(LATENTS)
        self.network, frozen = Rounding(error, **more), Rounding(error)
        frozen.requires_grad_(False)
        self.policy, self.reference = (
            binder(network, SCHEDULE, "epsilon", EMPTY, self.guidance) for network in (self.network, frozen)
        )
        self.parameters = [self.network.adapter]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-9)

    def start(self, name, arithmetic):
        """The records of two steps on rounds of four prompts in one chunk."""
        allowed = along_runs(arithmetic, self.table, self.dims, self.guidance, "epsilon")
        more = {"at_once": 2} if name == "spo" else {"fresh": False} if name == "prdp-passes" else {}
        method = self.method(name.split("-")[0], allowed=allowed, **more)
        passes = 1 if name == "prdp" else 2
        return list(self.rounds(method, prompts_per_chunk=4, passes=passes, max_steps=2))


@pytest.mark.parametrize("name", [*METHODS, "prdp-passes"])
@pytest.mark.parametrize(("arithmetic", "error"), ERRORS)
def test_memory_that_runs_out_while_learning_does_not_end_a_run(name, arithmetic, error, caplog):
    """Eight guided rows fit of sixteen (of SPO four of many): what was drawn is asked again in that batch."""
    records = Latents(error, rows=2 if name == "spo" else 8).start(name, arithmetic)
    assert [r.updated for r in records] == [True, True] and records[-1].progress.halvings >= 1
    first = records[0].metrics
    assert all(value == 0 for key, value in first.items() if key.startswith(("log_ratio", "drift")))
    assert "out of memory" in caplog.text
    if name != "spo":  # which stores no predictions
        (told,) = set(re.findall(r"drawn predictions are repeated .* differ by up to (\S+), relative", caplog.text))
        assert 0.5 * error < float(told) < 20 * error


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("arithmetic", "error"), ERRORS)
def test_kernels_may_differ_with_gradients_on(name, arithmetic, error):
    records = Latents(error, by_gradient=True).start(name, arithmetic)
    assert [r.updated for r in records] == [True, True]
    ratios = [value for key, value in records[0].metrics.items() if key.startswith(("log_ratio", "drift"))]
    # PRDP takes its values from the predictions of the run; its second pass is the one with gradients.
    assert any(ratios) == (name != "prdp")


@pytest.mark.parametrize("fault", ["dropout", "weights"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("arithmetic", "error"), ERRORS)
def test_a_fault_that_rounding_does_not_explain_ends_the_run(name, arithmetic, error, fault):
    """Something random, thirty times what rounding would do; or a policy with weights that its reference lacks."""
    toy = Latents(error, dropout=0.3 if fault == "dropout" else 0.0, rows=2 if name == "spo" else 8)
    if fault == "weights":
        toy.parameters[0].data += {"no": 0.01, "tf32": 0.1, "bf16": 0.5}[arithmetic]
    with pytest.raises(RuntimeError, match="before the first update|two passes of the denoiser differ"):
        toy.start(name, arithmetic)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2])
def test_the_bound_in_nats_is_that_of_the_gaussians(order, prediction_type, monkeypatch):
    """The log-ratio between the steps of two predictions that differ by rounding, by the Gaussians themselves."""
    monkeypatch.setitem(start_checks.ROUNDING, "test", 1e-2)
    monkeypatch.setitem(start_checks.NAMES, "test", "test")
    table = Toy(order=order, steps=8).table
    allowed = along_runs("test", table, math.prod(LATENTS), 1.0, prediction_type)
    largest = 0.0
    for k in (k for k in range(8) if table.stochastic[k]):
        x = rng.normal((1, *LATENTS), 0, "x")
        exact, rounded = [], []
        for j in range(int(table.order[k])):
            output, error = (rng.normal((1, *LATENTS), 0, what, j) for what in ("output", "error"))
            levels = table.alpha[k - j], table.sigma[k - j], prediction_type
            exact.append(to_clean(output, x, *levels))
            rounded.append(to_clean(output + 1e-2 * error, x, *levels))
        ran, now = (Gaussian(*step_gaussian(table, k, x, *clean)) for clean in (exact, rounded))
        after = ran.sample(rng.normal((1, *LATENTS), 0, "noise"))
        largest = max(largest, abs(float(now.log_ratio(ran, after))))
    assert 0.05 * allowed.step < largest < allowed.step <= allowed.run


class Rounded(Network):
    """The toy's network, each of whose outputs is off by a relative error of its own."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, x, t, text):
        self.calls += 1
        return super().forward(x, t, text) * (1 + self.error * rng.normal(x.shape, 5, "rounded", self.calls))


def first_step(loss, error):
    """DPO's or RankDPO's first step, whose policy and reference round apart."""
    run = make_run(max_steps=1, batch_size=4)
    policy, reference = Rounded(error), Rounded(error)
    reference.calls = 100
    arguments = run.settings | {"predict_policy": policy, "predict_reference": reference, "cache": MemoryPairs()}
    arguments |= {"parameters": [policy.up], "optimizer": torch.optim.SGD([policy.up], lr=0.0), "lr_scheduler": None}
    if loss == "dpo":
        return next(train_pairs(**arguments))
    arguments |= {
        "relevance": [[1.0, 0.0]] * 10, "loss": partial(rank_dpo, beta=1.0), "pair_weights": gain_weights
    }  # fmt: skip
    arguments["cache"].lengths = [2] * 10
    return next(train_rankings(**arguments))


@pytest.mark.parametrize("loss", ["dpo", "rankdpo"])
@pytest.mark.parametrize(
    ("kind", "precision", "error", "fits"),
    [
        ("cpu", "no", 0, True), ("cpu", "no", 1e-6, False), ("cuda", "no", 1e-5, True), ("cuda", "no", 1e-3, False),
        ("cuda", "fp16", 1e-3, True), ("cuda", "bf16", 1e-2, True), ("cpu", "bf16", 1e-2, True),
        ("cuda", "bf16", 0.1, False),
    ],
)  # fmt: skip
def test_offline_starts_are_as_exact_as_the_arithmetic(loss, kind, precision, error, fits, no_tf32, monkeypatch):
    for module in (dpo, rankdpo):
        monkeypatch.setattr(module, "between_outputs", lambda _: between_outputs(Device(kind, precision)))
    if fits:
        assert first_step(loss, error).updated
        return
    with pytest.raises(RuntimeError, match="already differs from its reference: their outputs are .* apart, relative"):
        first_step(loss, error)


class Device:
    def __init__(self, kind, mixed_precision="no"):
        self.device, self.mixed_precision = torch.device(kind), mixed_precision


def test_limits_depend_on_precision_and_device(no_tf32):
    assert between_outputs(Device("cpu")) == 0 and between_outputs(Device("cuda")) == FLOAT32
    assert between_outputs(Device("cpu", "bf16")) == 8 / 256 and between_outputs(Device("cuda", "fp16")) == 8 / 2048
    assert arithmetic(Device("cuda")) == "no"
    set_tf32(True)
    assert between_outputs(Device("cuda")) == 8 / 2048
    assert arithmetic(Device("cpu")) == arithmetic(Device("mps")) == "no"


def test_the_option_switches_tf32_in_products_and_in_convolutions(no_tf32):
    for allow in (True, False):
        set_tf32(allow)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allow
