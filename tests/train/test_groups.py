"""The stream of samples in groups: each micro-batch holds one, none lags, and a position says all."""

from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from helpers_train import MemoryPairs, in_processes, make_run
from safetensors.torch import load_file, save_file

from diffusion_align.methods.shared.metrics import mean_over_dims
from diffusion_align.train.groups import grouped_samples_at, members_of

GROUPS = [0] * 13 + [1] * 5 + [2] * 30 + [3]
MEMBERS = members_of(GROUPS)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_micro_batches_hold_one_group_and_no_group_lags(rows):
    count = rows * 400
    samples = grouped_samples_at(0, count, MEMBERS, rows, 5)
    for first in range(0, count, rows):
        assert len({GROUPS[index] for _, index in samples[first : first + rows]}) == 1
    assert len(set(samples)) == count  # a visit of an item has one address
    visits = Counter(GROUPS[index] for _, index in samples)
    for group, members in enumerate(MEMBERS):
        assert abs(visits[group] - count * len(members) / 49) <= rows * 4
    of_item = Counter(index for _, index in samples)
    for members in MEMBERS:
        seen = [of_item[index] for index in members]
        assert max(seen) - min(seen) <= 2  # the micro-batches of an epoch are shuffled
    # Epochs are shuffled anew, and so is the order of groups.
    orders = [[index for epoch, index in samples if index in MEMBERS[2] and epoch == e] for e in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_a_position_says_all_whatever_the_size_of_a_step():
    whole = grouped_samples_at(0, 480, MEMBERS, 4, 5)
    assert [s for first in range(0, 480, 16) for s in grouped_samples_at(first, 16, MEMBERS, 4, 5)] == whole
    assert grouped_samples_at(240, 240, MEMBERS, 4, 5) == whole[240:]
    assert grouped_samples_at(0, 480, MEMBERS, 4, 6) != whole
    with pytest.raises(ValueError, match="multiples of the 4 rows"):
        grouped_samples_at(2, 4, MEMBERS, 4, 5)


def test_fewer_items_than_rows():
    samples = grouped_samples_at(0, 40, ((0,), (1, 2)), 8, 0)
    assert Counter(index == 0 for _, index in samples) in ({True: 8, False: 32}, {True: 16, False: 24})


class Shapes(MemoryPairs):
    """Pairs of two shapes, as a cache with buckets has them."""

    def __init__(self, count=10):
        super().__init__(count)
        self.groups = [i % 3 > 0 for i in range(count)]
        self.asked = []

    def batch(self, indices, variants=None):
        self.asked.append([int(i) for i in indices])
        assert len({self.groups[int(i)] for i in indices}) == 1
        return super().batch(indices)


def records(run, **more):
    return [(record.loss, record.metrics["grad_norm"], record.progress) for record in run.steps(**more)]


def test_the_loop_asks_for_one_shape_and_resumes_where_it_was():
    whole = make_run(cache=Shapes(), batch_size=4, accumulation=2, max_steps=6)
    everything = records(whole)
    assert all(len(asked) == 2 for asked in whole.settings["cache"].asked)
    part = make_run(cache=Shapes(), batch_size=4, accumulation=2, max_steps=3)
    first = records(part)
    again = records(part, progress=first[-1][2], max_steps=6)
    assert first + again == everything


def test_two_processes_are_accumulation_2_bit_for_bit(tmp_path):
    def rows(**more):
        run = make_run(cache=Shapes(), batch_size=4, max_steps=5, accelerator=Accelerator(cpu=True), **more)
        return torch.tensor([list(record.row().values()) for record in run.steps()], dtype=torch.float64)

    assert in_processes(2, lambda rank: save_file({"rows": rows()}, tmp_path / f"{rank}.safetensors"))
    alone = rows(accumulation=2)
    for rank in (0, 1):
        assert torch.equal(load_file(tmp_path / f"{rank}.safetensors")["rows"], alone)


def test_one_shape_is_the_usual_stream():
    class One(MemoryPairs):
        groups = [0] * 10

    assert records(make_run(cache=One(10), max_steps=3)) == records(make_run(max_steps=3))


def test_gaps_are_means_over_the_dims_of_each_pair():
    values, dims = torch.tensor([8.0, 4.0, 6.0]), torch.tensor([4.0, 2.0, 2.0])
    assert mean_over_dims(values, dims) == pytest.approx(7 / 3) and mean_over_dims(values, 2) == 3.0
