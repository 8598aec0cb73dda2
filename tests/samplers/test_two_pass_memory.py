"""The memory of a path gradient does not grow with the number of steps; that of full autograd does.

Measured twice: bytes that autograd keeps alive for its backward, counted as they are saved and freed; and the peak
resident memory of a process.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_memory import main, peak_saved_bytes
from helpers_samplers import SD15, noise

from diffusion_align.models.analytic import ToyDenoiser
from diffusion_align.rng import generator
from diffusion_align.samplers import path_gradient, replay, rollout, step_table
from diffusion_align.schedule import Schedule


def setting(steps):
    network = ToyDenoiser(2, torch.Generator().manual_seed(0), hidden=1024, layers=3)
    table = step_table(Schedule.from_config(SD15), steps)
    return network, rollout(network, table, noise(8, 2, dtype=torch.float32), generator(0, "run"))


def loss(log_prob):
    return log_prob.sum(0).square().mean()


def test_saved_bytes_by_hand():
    """exp saves its result, a square its input: exp(x)^2 of 1000 float64 saves one storage twice, so 8000 bytes.
    Two such, one after the other, are 8000 at the peak; both before a backward, 16000; and a known storage is none.
    """
    x = noise(1000).requires_grad_()
    twice = lambda: x.exp().square().sum()  # noqa: E731
    assert peak_saved_bytes(lambda: (twice().backward(), twice().backward())) == 8000
    assert peak_saved_bytes(lambda: (twice().backward(), x[:10].exp().square().sum().backward())) == 8000
    assert peak_saved_bytes(lambda: (twice() + twice()).backward()) == 16000
    assert peak_saved_bytes(lambda: x.square().sum().backward()) == 8000
    assert peak_saved_bytes(lambda: x.square().sum().backward(), besides=[x]) == 0


@pytest.mark.parametrize("history", ["recompute", "frozen"])
def test_saved_bytes_are_flat_from_5_to_50_steps(history):
    peaks = {}
    for steps in (5, 50):
        network, run = setting(steps)
        work = partial(path_gradient, network, run, loss, history=history)
        peaks[steps] = peak_saved_bytes(work, besides=[*network.parameters(), run.states, run.clean])
    assert peaks[5] > 8 * 1024 * 4 * 3  # three hidden layers were really seen
    assert peaks[50] <= 1.05 * peaks[5]


def test_full_autograd_grows_with_steps():
    peaks = {}
    for steps in (5, 50):
        network, run = setting(steps)
        work = lambda: loss(replay(network, run)).backward()  # noqa: B023, E731
        peaks[steps] = peak_saved_bytes(work, besides=[*network.parameters(), run.states, run.clean])
    assert peaks[50] > 8 * peaks[5]


def test_the_bench_prints_what_it_returns(capsys):
    rows = main(["--model", "toy", "--steps", "5", "20"])
    (_, two_5, plain_5), (_, two_20, plain_20) = rows
    assert two_20 <= 1.05 * two_5 and plain_5 > 3 * two_5 and plain_20 > 3.5 * plain_5
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("toy, batch 2")
    for (steps, two, plain), line in zip(rows, printed[-2:], strict=True):
        assert line == f"| {steps} | {two / 2**20:.2f} | {plain / 2**20:.2f} | {plain / two:.1f} |"


def has_high_water_mark():
    status = Path("/proc/self/status")
    return status.exists() and "VmHWM" in status.read_text()


PROCESS = """
import torch
from diffusion_align.models.analytic import ToyDenoiser
from diffusion_align.rng import generator
from diffusion_align.samplers import path_gradient, replay, rollout, step_table
from diffusion_align.schedule import Schedule

network = ToyDenoiser(2, torch.Generator().manual_seed(0), hidden=64, layers=2)
def run(steps):
    table = step_table(Schedule.from_config({}), steps)
    return rollout(network, table, torch.zeros(10000, 2), generator(0, "run"))
def peak():  # the high-water mark of resident memory, in MiB; it never falls, so the order of the measurements matters
    # not getrusage: its mark survives exec, so it would tell of the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
loss = lambda log_prob: log_prob.sum(0).square().mean()
short, long = run(3), run(30)
path_gradient(network, short, loss)
marks = [peak()]
path_gradient(network, long, loss)
marks.append(peak())
loss(replay(network, long)).backward()
marks.append(peak())
print(*marks)
"""


@pytest.mark.skipif(not has_high_water_mark(), reason="/proc/self/status tells no peak of resident memory here")
def test_peak_resident_memory_of_a_process():
    """10 000 samples: a step's activations are about 5 MiB, its latents 0.08 MiB: 27 more cost latents, or 130 MiB."""
    # Large blocks go back to the system when freed, so that the process holds what is in use and not what once was.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PROCESS], env=env, capture_output=True, text=True, check=True)
    short, long, full = (float(mark) for mark in done.stdout.split())
    print(f"peak MiB: {short:.0f} at 3 steps, {long:.0f} at 30; full autograd {full:.0f}")
    assert long - short < 40
    assert full - long > 80
