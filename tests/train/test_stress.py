"""The functions of the stress programs (`make stress`) with small numbers."""

from stress import bad_numbers, resume, runs


def test_stopped_and_resumed_runs_have_the_same_bits(capsys):
    assert resume.main(["--smoke", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "4 resumes, 0 wrong" in said and "3 signals at random moments" in said


def test_the_comparison_notices_another_seed(tmp_path):
    """A run with another seed differs in everything that the comparison reads."""
    world = runs.make_world(tmp_path)
    for seed in (0, 1):
        assert (
            runs.train(runs.flags(world, "dpo", tmp_path / f"run-{seed}", f"--seed={seed}", "--max_train_steps=2"))[0]
            == 0
        )
    found = " ".join(runs.differences(tmp_path / "run-1", runs.end_of(tmp_path / "run-0")))
    assert all(part in found for part in ("metrics.jsonl", "state.json: identity", "model: ", "optimizer: "))


def test_numbers_that_are_not_finite_and_memory_that_runs_out(capsys):
    assert bad_numbers.main(["--steps", "4", "--methods", "prdp", "spo"]) == 0
    assert capsys.readouterr().out.count(" 0 wrong") == 3 + 2 * 4 + 1 + 3 + 2 * 3
