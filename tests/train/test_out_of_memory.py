"""When memory runs out: smaller pieces, the same samples, the same gradient up to rounding, and a word about it."""

import pytest
import torch
from helpers_memory import FullOnTheWayBack, Limited, full, short_of_memory
from helpers_online import METHODS, PROMPTS, Toy, darkness
from helpers_train import MemoryPairs, make_run

from diffusion_align import cli
from diffusion_align.system import memory
from diffusion_align.system.memory import OutOfMemory, in_parts


def test_sizes_are_halved_and_stay_halved():
    sizes = []

    def work(rows):
        if rows.stop - rows.start > 3:
            full()
        sizes.append(rows.stop - rows.start)
        return list(range(rows.start, rows.stop))

    parts, size = in_parts(work, 10, 8, "work")
    assert sum(parts, []) == list(range(10)) and sizes == [2, 2, 2, 2, 2] and size == 2
    assert in_parts(work, 0, 8, "work")[0] == [[]]


def test_one_item_that_does_not_fit_names_three_remedies(caplog, capsys, monkeypatch):
    with pytest.raises(OutOfMemory, match="decoding: out of memory with one at a time"):
        in_parts(full, 4, 4, "decoding")
    monkeypatch.setattr(cli, "_run", lambda argv: full() if argv else in_parts(full, 1, 1, "decoding"))
    for argv in ([], ["sample"]):  # our error and torch's own
        assert cli.main(argv) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "out of memory" in line and "the three cheapest remedies" in line
        assert all(cure in line for cure in ("gradient_checkpointing", "bf16", "sample_chunk"))
    assert "decoding: out of memory with 4 at a time; going on with 2" in caplog.text


def test_other_errors_are_not_taken_for_out_of_memory():
    def broken(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        in_parts(broken, 4, 4, "work")
    assert memory.ran_out(
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
    )


@pytest.mark.parametrize("way", ["forward", "backward", "reference", "late"])
@pytest.mark.parametrize(("mode", "accumulation"), [("lora", 1), ("lora", 2), ("full", 1)])
def test_offline_steps_continue_with_smaller_micro_batches(mode, accumulation, way, caplog):
    """Pairs are 2 rows each, pieces of 6 pairs where 4 rows fit: cut into 3 and then 2 pairs. "late": in the last piece
    of the third step, when the others have left their gradients."""
    settings = {"mode": mode, "accumulation": accumulation, "batch_size": 6 * accumulation, "max_steps": 6}
    settings |= {"cache": MemoryPairs(20), "caption_dropout": 0.3, "warmup": 0}
    whole, cut = make_run(**settings), make_run(**settings)
    rows = list(whole.steps())
    limited = Limited(cut.network, 4, after=accumulation * 3 - 1 if way == "late" else 0)
    changes = {"predict_policy": limited}
    if way == "backward":
        changes = {"predict_policy": lambda x, t, text: FullOnTheWayBack.apply(cut.network(x, t, text), 4)}
    elif way == "reference":
        cut.reference, changes = Limited(cut.reference, 4), {}
    found = list(cut.steps(**changes))
    assert [r.progress.samples for r in found] == [r.progress.samples for r in rows]
    for a, b in zip(found, rows, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(cut.weights()[name], weight, rtol=0, atol=1e-5)
    first = 2 if way == "late" else 0
    assert [r.progress.halvings for r in found] == [0] * first + [2] * (6 - first)
    assert found[-1].metrics["halvings"] == 2 and "halvings" not in rows[-1].metrics
    assert f"step {first + 1}: out of memory with 6 at a time; going on with 3" in caplog.text


def test_a_resumed_run_keeps_its_halved_micro_batches():
    """To the bit: the pieces are those of the uninterrupted run, without running out of memory again."""
    settings = {"batch_size": 8, "max_steps": 6, "cache": MemoryPairs(20)}
    whole = make_run(**settings)
    rows = list(whole.steps(predict_policy=Limited(whole.network, 4)))
    cut = make_run(**settings)
    steps = cut.steps(predict_policy=Limited(cut.network, 4))
    for _ in range(3):
        last = next(steps)
    after = list(cut.steps(last.progress, predict_policy=cut.network))  # would fit, but is not asked whether it does
    assert [r.row() for r in after] == [r.row() for r in rows[3:]]
    assert all(torch.equal(a, b) for a, b in zip(whole.weights().values(), cut.weights().values(), strict=True))


def test_offline_training_ends_where_one_pair_does_not_fit():
    run = make_run()
    before = run.weights()
    with pytest.raises(OutOfMemory, match="step 1: out of memory with one at a time"):
        next(run.steps(predict_policy=Limited(run.network, 1)))
    assert all(torch.equal(before[name], weight) for name, weight in run.weights().items())


@pytest.mark.parametrize("place", ["drawing", "scoring", "learning"])
@pytest.mark.parametrize("name", METHODS)
def test_rounds_go_on_in_smaller_chunks(name, place, caplog):
    """Chunks of 4 prompts where the pictures of one or two fit."""
    settings = {"prompts_per_chunk": 4, "passes": 2, "max_steps": 4}
    whole, cut = Toy(double=True), Toy(double=True)
    more = {"fresh": False} if name == "prdp" else {}
    rows = list(whole.rounds(whole.method(name, **more), **settings))
    method = cut.method(name, **more)
    short_of_memory(cut, name, place)
    found = list(cut.rounds(method, **settings))
    for a, b in zip(found, rows, strict=True):
        assert a.metrics["items"] == b.metrics["items"] and a.loss == pytest.approx(b.loss, rel=1e-5, abs=1e-5)
    # States are float32, so an ulp of them that hangs on the size of a chunk may go through the steps that follow.
    start = Toy(double=True).weights()
    for a, b, before in zip(whole.weights(), cut.weights(), start, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * (a - before).abs().max().item())
    assert found[-1].progress.halvings >= 1 and "out of memory" in caplog.text


@pytest.mark.parametrize("tied", [False, True])
def test_a_prompt_that_does_not_fit_memory_ends_the_run(tied):
    """Also where a chunk could be cut that there is nothing to learn from, as all but the first prompt are tied."""
    toy = Toy(
        reward=lambda x, prompts: darkness(x, prompts) * torch.tensor([not tied or p == PROMPTS[0] for p in prompts])
    )
    network = toy.policy_calls.network

    def limited(x, t, text):
        return full() if torch.is_grad_enabled() else network(x, t, text)

    toy.policy_calls.network = limited
    with pytest.raises(OutOfMemory, match="step 1: out of memory with the pictures of one prompt"):
        next(toy.rounds(toy.method("d3po")))
