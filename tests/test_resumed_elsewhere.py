"""A run that is moved, copied, lengthened or changed between its stop and its resumption: the real command."""

import json
import re
import shutil
from pathlib import Path

import pytest
from stress.runs import differences, end_of, flags, make_world, stop_at, train

from diffusion_align.commands.train import tracking
from diffusion_align.commands.train.identity import facts_of, require_same_run
from diffusion_align.data import write_pairs_parquet
from diffusion_align.data.images import encode_png
from diffusion_align.options import TrainD3po, TrainDpo, TrainRankdpo
from diffusion_align.train import record
from diffusion_align.train.checkpoints.store import Checkpoint, CheckpointError

DIGEST = re.compile(r"[0-9a-f]{12,}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world):
    run = world / "whole"
    assert train(flags(world, "dpo", run))[0] == 0
    return run


def files_of(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_copied_and_moved_runs_resume_in_their_new_folder(world, whole, tmp_path, monkeypatch):
    """The copy's original stays as it is, byte for byte; the trackers are told at which step."""
    monkeypatch.chdir(world)  # where the options' relative paths mean something
    argv = [word.removeprefix(f"{world}/") for word in flags(world, "dpo", tmp_path / "a", "--report_to=none")]
    assert train(argv, stop_at(5))[0] == 143
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = files_of(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    started, real = [], tracking.start_trackers
    monkeypatch.setattr(tracking, "start_trackers", lambda *given: started.append(given[-1]) or real(*given))
    code, said = train(["train", "dpo", "--config", "b/config.yaml", "--resume_from_checkpoint", "latest"])
    assert code == 0 and started == [5] and f"the run is in {tmp_path / 'b'}; it was in {tmp_path / 'a'}" in said
    assert list(differences(tmp_path / "b", end_of(whole))) == []
    assert files_of(tmp_path / "a") == before
    (tmp_path / "a").rename(tmp_path / "c")
    assert train(["train", "dpo", "--config", "c", "--resume_from_checkpoint", "latest"])[0] == 0
    assert list(differences(tmp_path / "c", end_of(whole))) == [] and not (tmp_path / "a").exists()
    lora = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "b" / lora).read_bytes() == (tmp_path / "c" / lora).read_bytes() == (whole / lora).read_bytes()


def test_extend_redraws_a_decaying_rate_over_the_longer_run(world, whole, tmp_path, capsys):
    """Linear, 2 steps of warm-up, peak 1e-3: the rate of step n + 1 is 1e-3 (total - n) / (total - 2)."""
    run = tmp_path / "run"
    argv = [word if word != "cosine" else "linear" for word in flags(world, "dpo", run)]
    assert train(argv)[0] == 0
    before = record.read(run / "metrics.jsonl")
    longer = [*argv, "--max_train_steps=16", "--resume=latest"]
    code, said = train(longer)
    assert code == 1 and "steps was 12 and is now 16 (--extend continues, with the learning rate planned" in said
    assert train([*longer, "--extend"])[0] == 0
    rows = record.read(run / "metrics.jsonl")
    assert rows[:12] == before and [row["step"] for row in rows] == list(range(1, 17))
    assert before[-1]["lr"] == pytest.approx(1e-3 * 1 / 10, rel=1e-12)
    assert [row["lr"] for row in rows[12:]] == pytest.approx([1e-3 * (16 - n) / 14 for n in range(12, 16)], rel=1e-12)
    assert json.loads((run / "checkpoints/step-00000016/state.json").read_text())["identity"]["steps"] == 16
    code, said = train([*argv, "--max_train_steps=14", "--resume=latest", "--extend"])
    assert code == 2 and "the checkpoint is at step 16 and the run ends at step 14" in said
    assert "--extend continues" not in said
    code, said = train([*argv, "--extend"])
    assert code == 2 and "give --resume_from_checkpoint as well" in said


def test_changed_settings_are_named(world, whole):
    argv = [*flags(world, "dpo", whole), "--resume=latest"]
    code, said = train([*argv, "--max_train_samples=8"])
    assert code == 1 and "their number was 10 and is now 8, --max_train_samples was None and is now 8" in said
    other = world / "other.parquet"
    picture = [encode_png(__import__("torch").full((3, 64, 64), 0.1 * i)) for i in range(10)]
    write_pairs_parquet(other, [f"a {i}" for i in range(10)], picture, picture[::-1], [1.0] * 10)
    code, said = train([*argv, f"--train_data_dir={other}", "--beta=3"])
    wanted = f"--train_data_dir was {world / 'pairs.parquet'} and is now {other}"
    assert code == 1 and wanted in said and "(made of --beta_dpo, --beta_convention and --resolution)" in said
    assert not DIGEST.search(said)


def saved(o, identity, number=10, **state):
    return Checkpoint(Path("c"), 1, {}, {"identity": identity, "facts": facts_of(o, number=number), **state})


def refusal(o, resumed, identity, number=10, processes=1):
    with pytest.raises(CheckpointError) as caught:
        require_same_run(o, resumed, identity, facts_of(o, number=number), processes)
    said = str(caught.value)
    assert not DIGEST.search(said) and "\n" not in said and said.endswith("or start a new run folder")
    return said


def test_each_digest_has_words():
    a, b = "a" * 64, "b" * 64
    dpo = TrainDpo("models/a", train_data_dir="pairs")
    said = refusal(TrainDpo("models/b", train_data_dir="pairs"), saved(dpo, {"model": a}), {"model": b})
    assert "the model changed: --pretrained_model_name_or_path was models/a and is now models/b" in said
    said = refusal(dpo, saved(dpo, {"data": a}), {"data": b})
    assert "or their order) changed: other content under their number 10, --train_data_dir" in said
    rank = TrainRankdpo("m", dataset_name="tiny")
    said = refusal(rank, saved(rank, {"relevance": a}, 7), {"relevance": b}, 6)
    assert "the relevance of the rankings' pictures changed: their number was 7 and is now 6" in said
    online = TrainD3po("m", prompts="p.txt")
    assert "the list of prompts changed: their number was 7" in refusal(
        online, saved(online, {"prompts": a}, 7), {"prompts": b}
    )
    said = refusal(online, saved(online, {"preference_model": a}), {"preference_model": b})
    assert "the preference model changed" in said
    old = Checkpoint(Path("c"), 1, {}, {"identity": {"data": a, "seed": 1}})  # of a version that kept no facts
    assert "changed; seed was 1 and is now 2" in refusal(dpo, old, {"data": b, "seed": 2})


def test_another_number_of_processes_is_named_as_the_cause_of_another_batch():
    o = TrainDpo("m", train_data_dir="p")
    said = refusal(o, saved(o, {"batch": 32}, processes=2), {"batch": 16}, processes=1)
    assert "batch was 32 and is now 16 (it was saved by 2 processes, and there are now 1)" in said
    said = refusal(o, saved(o, {"batch": 32}, processes=1), {"batch": 16}, processes=1)
    assert "batch was 32 and is now 16 (--train_batch_size x --gradient_accumulation_steps x processes)" in said


def test_new_options_at_their_default_do_not_block_a_resume():
    o = TrainDpo("m", train_data_dir="p")
    assert require_same_run(o, saved(o, {"seed": 0}), {"seed": 0, "ema_decay": 0.999, "use_ema": False}, {}, 1) is None
    assert "ema_decay was 'absent' and is now 0.5" in refusal(o, saved(o, {"seed": 0}), {"seed": 0, "ema_decay": 0.5})


def test_a_reward_is_the_same_wherever_its_file_lies():
    o = TrainD3po("m", prompts="p")
    resumed = saved(o, {"reward": "0.5:pickscore=w/a,python:r.py:f"})
    same = {"reward": "0.5:pickscore=/x/w/a,python:/y/r.py:f"}
    assert require_same_run(o, resumed, same, {}, 1) is None
    assert "reward was" in refusal(o, resumed, {"reward": "0.5:pickscore=w/b,python:r.py:f"})
