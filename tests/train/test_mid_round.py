"""A round that is stopped in its middle goes on from the checkpoint, which then holds what the round had drawn."""

import itertools

import pytest
import torch
from helpers_online import METHODS, Toy, darkness

from diffusion_align.methods import d3po, spo
from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.checkpoints.round_data import pack_round, round_name, round_of, unpack_round
from diffusion_align.train.checkpoints.state import pack, restore
from diffusion_align.train.checkpoints.store import CheckpointError
from diffusion_align.train.method import Round

ROUNDS = {"prompts_per_step": 2, "passes": 2, "max_steps": 8}  # 4 steps a round

CHUNKS = (*d3po.METHOD.chunks, *spo.METHOD.chunks)


def method_of(toy, name):
    """Its data are used for several steps, so PRDP may not take the runs' predictions for the policy's."""
    return toy.method(name, **({"fresh": False} if name == "prdp" else {}))


def named(toy):
    return dict(zip(("up", "down"), toy.parameters, strict=True))


def saved(toy, record, folder):
    tensors, state = pack(named(toy), toy.optimizer, None, record.progress)
    if record.round is not None:
        tensors[round_name(0)] = pack_round(record.round)
    return checkpoint.load(checkpoint.save(folder, record.step, tensors, {**state, "processes": 1}))


@pytest.mark.parametrize("window", [None, (2, 2)])
@pytest.mark.parametrize("name", METHODS)
def test_stopping_after_any_step_changes_nothing(name, window, tmp_path):
    whole = Toy(window=window)
    rows = [r.row() for r in whole.rounds(method_of(whole, name), **ROUNDS)]
    for stop in range(1, 8):
        cut = Toy(window=window)
        records = list(itertools.islice(cut.rounds(method_of(cut, name), **ROUNDS), stop))
        loaded = saved(cut, records[-1], tmp_path / str(stop))
        resumed = Toy(window=window)
        progress = restore(loaded, named(resumed), resumed.optimizer, None)
        assert progress.in_round == stop % 4
        data = round_of(loaded, 0, 1, CHUNKS) if progress.in_round else None
        later = list(resumed.rounds(method_of(resumed, name), progress=progress, round=data, **ROUNDS))
        assert [r.row() for r in [*records, *later]] == rows
        assert all(torch.equal(a, b) for a, b in zip(whole.weights(), resumed.weights(), strict=True))


def test_the_middle_of_a_round_needs_its_data_and_its_processes(tmp_path):
    toy = Toy()
    record = next(toy.rounds(toy.method("d3po"), **ROUNDS))
    with pytest.raises(ValueError, match="continue after step 1 of a round, give the data of that round"):
        next(toy.rounds(toy.method("d3po"), progress=record.progress, **ROUNDS))
    with pytest.raises(ValueError, match="give the data of that round"):
        next(toy.rounds(toy.method("d3po"), round=record.round, **ROUNDS))
    loaded = saved(toy, record, tmp_path)
    with pytest.raises(CheckpointError, match="inside a round that 1 processes drew, and there are now 2"):
        round_of(loaded, 0, 2, CHUNKS)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("shape.json"),
        lambda t: t.pop(next(name for name in t if name.endswith("states"))),
        lambda t: t.update({"shape.json": torch.frombuffer(bytearray(b"[1, 2"), dtype=torch.uint8)}),
        lambda t: t.update({"shape.json": torch.frombuffer(bytearray(b"[1, 2]"), dtype=torch.uint8)}),
        lambda t: t.update(
            {"shape.json": torch.frombuffer(bytearray(b'{"kind": "Path", "fields": {}}'), dtype=torch.uint8)}
        ),
    ],
)
def test_other_tensors_are_not_a_round(change):
    toy = Toy()
    tensors = pack_round(next(toy.rounds(toy.method("d3po"), **ROUNDS)).round)
    change(tensors)
    with pytest.raises(CheckpointError, match="data of a round"):
        unpack_round(tensors, CHUNKS)


def test_only_known_records_are_saved():
    with pytest.raises(TypeError, match="round.chunks.0.0: a checkpoint cannot hold a Toy"):
        pack_round(Round([[Toy()]], 0))


@pytest.mark.parametrize("name", METHODS)
def test_a_stop_request_while_drawing_ends_the_loop_before_learning(name):
    """Asked in the second round, behind its first chunk: the loop ends where the first round had."""
    toy, records = Toy(), []
    method = toy.method(name)
    for record in toy.rounds(method, max_steps=4, stop_requested=lambda: len(records) > 0):
        records.append(record)
    assert [r.step for r in records] == [1] and records[0].round is None
    whole = Toy()
    rows = [r.row() for r in whole.rounds(whole.method(name), max_steps=4)]
    later = list(toy.rounds(method, progress=records[0].progress, max_steps=4))
    assert [r.row() for r in [*records, *later]] == rows


@pytest.mark.parametrize("name", ["d3po", "prdp", "ddpo"])
def test_scoring_during_drawing_changes_nothing(name):
    """And the first chunk is scored while the second is drawn: were it not, neither would be waiting for the other."""
    import threading
    from functools import partial

    from diffusion_align.methods.shared.runs import draw_runs, scored

    drawing, lone = threading.current_thread(), []

    class Unscored(Toy):
        def draw(self, samples, round=0):
            lone.append(threading.current_thread() is drawing)
            return draw_runs(
                self.policy, self.reference, self.table, self.prompted(samples), group=self.group,
                share_noise=self.share, shape=(2, 4, 4), seed=self.seed,
            )  # fmt: skip

    ends = []
    for toy, later in ((Toy(), None), (Unscored(), False), (Unscored(), True)):
        more = {} if later is None else {"score": partial(scored, score=darkness), "ahead": later}
        records = list(toy.rounds(toy.method(name, **more), max_steps=3))
        ends.append(([r.row() for r in records], toy.weights()))
    assert ends[0][0] == ends[1][0] == ends[2][0]
    assert all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*(weights for _, weights in ends), strict=True)
    )
    assert lone == [True] * 6 + [False] * 6


def test_comparisons_split_into_complete_families():
    """All 3 pairs of three children stay together, for they share one evaluation of their parent."""
    toy = Toy()
    pairs = toy.branch([(0, i) for i in range(4)], all_pairs=True)
    for times in (1, 2, 3, 100):
        parts = pairs.split(times)
        families = [set(part.family.tolist()) for part in parts]
        assert len(parts) <= min(times, len(set(pairs.family.tolist())))
        assert sum(map(len, families)) == len(set(pairs.family.tolist())) and sum(map(len, parts)) == len(pairs)
        assert torch.equal(torch.cat([part.child for part in parts], 1), pairs.child)
    assert len(pairs.split(100)) == len(set(pairs.family.tolist())) > 4


def test_runs_split_into_complete_groups():
    toy = Toy()
    runs = toy.draw([(0, i) for i in range(4)])
    parts = runs.split(3)
    assert [len(part.prompts) for part in parts] == [2, 2] and len(runs.split(9)) == 4 and runs.split(1) == [runs]
    assert torch.equal(torch.cat([part.trajectory.states for part in parts], 1), runs.trajectory.states)
    assert torch.equal(torch.cat([part.reward for part in parts]), runs.reward)
    assert [prompt for part in parts for prompt in part.prompts] == runs.prompts
