"""The memory of a path gradient does not grow with the number of steps; that of full autograd does.

Measured twice: bytes that autograd keeps alive for its backward, counted as they are saved and freed; and the peak
resident memory of a process.
"""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from helpers_samplers import SD15, noise

from diffusion_align.models.analytic import ToyDenoiser
from diffusion_align.rng import generator
from diffusion_align.samplers import path_gradient, replay, rollout, step_table
from diffusion_align.schedule import Schedule


class SavedBytes:
    """Bytes that autograd holds for backward, now and at their peak, without the network's own weights."""

    def __init__(self, network):
        self.weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self.now = self.peak = 0

    def _free(self, size):
        self.now -= size

    def pack(self, tensor):
        box = Box(tensor)
        if tensor.untyped_storage().data_ptr() not in self.weights:
            size = tensor.numel() * tensor.element_size()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(box, self._free, size)
        return box

    def measure(self, work):
        self.peak = self.now
        before = self.now
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor):
            work()
        assert self.now == before  # every saved tensor was freed: the count is a true one
        return self.peak


class Box:
    def __init__(self, tensor):
        self.tensor = tensor


def setting(steps):
    network = ToyDenoiser(2, torch.Generator().manual_seed(0), hidden=1024, layers=3)
    table = step_table(Schedule.from_config(SD15), steps)
    return network, rollout(network, table, noise(8, 2, dtype=torch.float32), generator(0, "run"))


def loss(log_prob):
    return log_prob.sum(0).square().mean()


@pytest.mark.parametrize("history", ["recompute", "frozen"])
def test_saved_bytes_are_flat_from_5_to_50_steps(history):
    peaks = {}
    for steps in (5, 50):
        network, run = setting(steps)
        peaks[steps] = SavedBytes(network).measure(lambda: path_gradient(network, run, loss, history=history))  # noqa: B023
    assert peaks[5] > 8 * 1024 * 4 * 3  # three hidden layers were really seen
    assert peaks[50] <= 1.05 * peaks[5]


def test_full_autograd_grows_with_steps():
    peaks = {}
    for steps in (5, 50):
        network, run = setting(steps)
        peaks[steps] = SavedBytes(network).measure(lambda: loss(replay(network, run)).backward())  # noqa: B023
    assert peaks[50] > 8 * peaks[5]


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
