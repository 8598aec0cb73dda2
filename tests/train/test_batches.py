"""A step for so many pairs of a round: which, in what order, how many, on several processes, and from the middle."""

import itertools
import json

import pytest
import torch
from helpers_memory import short_of_memory
from helpers_online import Toy
from helpers_train import in_processes
from safetensors.torch import load_file, save_file

from diffusion_align import rng
from diffusion_align.methods import d3po, spo
from diffusion_align.methods.spo import learn_spo, pick_pairs
from diffusion_align.train.checkpoints.round_data import pack_round, unpack_round
from diffusion_align.train.rounds import NothingToLearn

PAIRS = {"items_per_step": 5, "max_steps": 99, "max_rounds": 2}  # 12 pairs a round of 4 prompts: 5, 5 and 2

CHUNKS = (*d3po.METHOD.chunks, *spo.METHOD.chunks)


def filtered(**more):
    """Scores so close that the threshold keeps some of the pairs only, and of each round another number."""
    toy = Toy(**more)
    whole = toy.branch
    toy.branch = lambda samples, round=0: whole(samples, round, threshold=0.5)
    return toy


def weights(toy):
    return torch.cat([w.flatten() for w in toy.weights()])


@pytest.mark.parametrize("all_pairs", [False, True])
def test_a_step_takes_the_pairs_that_the_address_draws(all_pairs):
    """Each pair once a pass, the last step what is left, another order in the next pass; and the step is the mean loss
    of exactly those pairs, added up here over one chunk with the pairs in the order of their prompts."""
    toy = Toy(double=True)
    toy.optimizer.param_groups[0]["lr"] = 0.1
    draw = toy.branch
    toy.branch = lambda samples, round=0: draw(samples, round, all_pairs=all_pairs)
    by_hand, per_step = Toy(double=True), 5 if not all_pairs else 15
    records = toy.rounds(toy.method("spo"), items_per_step=per_step, passes=2, max_steps=99, max_rounds=1)
    pairs = by_hand.branch(
        [(0, index) for index in rng.permutation(6, 0, "shuffle", 0).tolist()[:4]], all_pairs=all_pairs
    )
    pairs = pairs.of(pairs.by_prompt())
    count = -(-len(pairs) // per_step)
    for number, record in enumerate(records):
        which, place = divmod(number, count)
        order = rng.permutation(len(pairs), 0, "pairs", 0, which)
        rows = order[place * per_step : (place + 1) * per_step].sort().values
        learn_spo(pairs.of(rows), by_hand.policy, by_hand.reference, by_hand.table, 1 / len(rows), beta=10.0, clip=0.1)
        with torch.no_grad():
            for p in by_hand.parameters:
                p -= 0.1 * p.grad
                p.grad = None
        assert record.metrics["items"] == len(rows)
        torch.testing.assert_close(weights(toy), weights(by_hand), rtol=1e-6, atol=1e-8)
    assert number + 1 == 2 * count == 2 * (3 if not all_pairs else -(-len(pairs) // 15)) and record.ends


def test_the_run_ends_after_its_rounds_or_exactly_at_its_steps():
    toy = Toy()
    records = list(toy.rounds(toy.method("spo"), **PAIRS))
    assert [r.metrics["items"] for r in records] == [5, 5, 2] * 2
    assert [r.ends for r in records] == [False] * 5 + [True] and records[-1].progress.samples == 8
    assert [r.round is None for r in records] == [False, False, True] * 2
    assert list(toy.rounds(toy.method("spo"), progress=records[-1].progress, **PAIRS)) == []
    short = Toy()
    cut = list(short.rounds(short.method("spo"), items_per_step=5, max_steps=5))
    assert [r.row() for r in cut[:4]] == [r.row() for r in records[:4]] and len(cut) == 5
    assert cut[-1].ends and cut[-1].round is None and cut[-1].progress.in_round == 0


def test_the_number_of_steps_follows_from_the_kept_pairs():
    toy = filtered()
    records = list(toy.rounds(toy.method("spo"), items_per_step=2, max_steps=99, max_rounds=4))
    by_round = {}
    for record in records:
        by_round.setdefault(record.progress.samples - (4 if record.round is None else 0), []).append(record)
    kept = [sum(r.metrics["items"] for r in rows) for rows in by_round.values()]
    assert len(set(kept)) > 1 and [len(rows) for rows in by_round.values()] == [-(-int(n) // 2) for n in kept]


def test_a_round_without_pairs_is_one_skipped_step():
    toy = Toy()
    whole, rounds = toy.branch, []
    toy.branch = lambda s, round=0: whole(s, round, threshold=0.0 if rounds.append(round) or round else 1 - 1e-12)
    records = list(toy.rounds(toy.method("spo"), **PAIRS))
    assert [r.metrics["items"] for r in records] == [0, 5, 5, 2] and not records[0].updated
    toy = Toy(reward=lambda latents, prompts: torch.ones(len(prompts)))
    with pytest.raises(NothingToLearn, match="5 steps in a row"):
        list(toy.rounds(toy.method("spo"), items_per_step=5, max_steps=99))


def test_chunks_do_not_decide_which_pairs_a_step_takes():
    ends = []
    for chunk in (1, 3, 4):
        toy = filtered(double=True)
        rows = [r.metrics["items"] for r in toy.rounds(toy.method("spo"), prompts_per_chunk=chunk, **PAIRS)]
        ends.append((rows, weights(toy)))
    assert ends[0][0] == ends[1][0] == ends[2][0]
    for _, end in ends[1:]:
        torch.testing.assert_close(end, ends[0][1], rtol=1e-7, atol=1e-9)


def test_two_processes_take_the_same_pairs(tmp_path):
    """The first round's second step has none for one of them, so the other's gradient is the mean of both."""
    one = filtered(double=True)
    rows = list(one.rounds(one.method("spo"), prompts_per_chunk=1, items_per_step=2, max_steps=99, max_rounds=2))

    def work(rank):
        from accelerate import Accelerator

        toy, where = filtered(double=True), Accelerator(cpu=True)
        records = list(
            toy.rounds(
                toy.method("spo"), prompts_per_chunk=2, items_per_step=2, max_steps=99, max_rounds=2, accelerator=where
            )
        )
        save_file({"all": weights(toy)}, tmp_path / f"{rank}.safetensors")
        (tmp_path / f"{rank}.json").write_text(json.dumps([r.row() for r in records]))

    assert in_processes(2, work)
    for rank in (0, 1):
        torch.testing.assert_close(
            weights(one), load_file(tmp_path / f"{rank}.safetensors")["all"], rtol=1e-9, atol=1e-12
        )
        for a, b in zip(rows, json.loads((tmp_path / f"{rank}.json").read_text()), strict=True):
            assert b == pytest.approx(a.row(), rel=1e-6, abs=1e-9)


def test_stopping_after_any_step_changes_nothing():
    """The round's data go through the tensors of a checkpoint; the order of its pairs is drawn again at its address."""
    settings = PAIRS | {"items_per_step": 3, "passes": 2}
    whole = filtered()
    rows = [r.row() for r in whole.rounds(whole.method("spo"), **settings)]
    for stop in range(1, len(rows)):
        toy = filtered()
        first = list(itertools.islice(toy.rounds(toy.method("spo"), **settings), stop))
        last = first[-1]
        data = None if last.round is None else unpack_round(pack_round(last.round), CHUNKS)
        later = list(toy.rounds(toy.method("spo"), progress=last.progress, round=data, **settings))
        assert [r.row() for r in [*first, *later]] == rows
        assert torch.equal(weights(toy), weights(whole))


def test_out_of_memory_steps_use_the_same_pairs_in_smaller_chunks(caplog):
    whole, cut = Toy(double=True), Toy(double=True)
    rows = list(whole.rounds(whole.method("spo"), prompts_per_chunk=4, **PAIRS))
    method = cut.method("spo")
    short_of_memory(cut, "spo", "learning")
    found = list(cut.rounds(method, prompts_per_chunk=4, **PAIRS))
    for a, b in zip(found, rows, strict=True):
        assert a.metrics["items"] == b.metrics["items"] and a.loss == pytest.approx(b.loss, rel=1e-7, abs=1e-12)
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-6, atol=1e-9)
    assert found[-1].progress.halvings >= 1 and "out of memory" in caplog.text


def test_picked_pairs_are_split_by_family():
    """In parts of two parents each: a step of SDXL's two pairs of a chunk does not run the network for each chunk."""
    toy = Toy()
    chunks = [toy.branch([(0, i) for i in part], all_pairs=True) for part in ((0, 1, 2), (3, 4))]
    flat = [chunk.of(chunk.by_prompt()) for chunk in chunks]
    everything = torch.cat([part.child for part in flat], 1)
    numbers = torch.tensor([0, 1, 2, 5, len(flat[0]) - 1, len(flat[0]), len(flat[0]) + 1])
    parts = pick_pairs(chunks, numbers, at_once=2)
    assert torch.equal(torch.cat([part.child for part in parts], 1), everything[:, numbers])
    assert [len(part.family.unique()) for part in parts] == [2, 2] and sum(map(len, parts)) == 7
    assert all(bool((part.family.diff() >= 0).all()) for part in parts)


def test_methods_of_whole_groups_have_no_pairs_to_pick():
    toy = Toy()
    with pytest.raises(ValueError, match="learns from all items of a prompt together: use prompts_per_step"):
        next(toy.rounds(toy.method("d3po"), items_per_step=2))
    with pytest.raises(ValueError, match="items_per_step must be at least 1 and needs prompts_per_step equal"):
        next(toy.rounds(toy.method("spo"), items_per_step=2, prompts_per_step=2))
