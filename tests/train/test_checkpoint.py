"""Checkpoints: whole or absent whatever happens, every damaged byte refused, nothing in them that can run."""

import os

import pytest
import torch
from helpers_checkpoint import content, is_content, names

from diffusion_align.train.checkpoints.store import CheckpointError, latest_good, load, require_same_identity, save


def test_saved_checkpoints_load(tmp_path):
    path = save(tmp_path / "new" / "folder", 12, *content(12))
    assert path.name == "step-00000012"
    assert names(path) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    loaded = latest_good(tmp_path / "new" / "folder")
    assert loaded.step == 12 and loaded.path == path and is_content(loaded)


def test_views_and_shared_tensors_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "model": {"t": base.T, "row": base[1], "same": base, "half": base.bfloat16(), "bytes": base.to(torch.uint8)}
    }
    loaded = load(save(tmp_path, 1, tensors, {})).tensors["model"]
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors["model"].items())


def test_checkpoints_have_the_permissions_of_their_folder(tmp_path):
    """Whatever the user's mask: safetensors makes files that only their owner can read."""
    for folder, mask in (("a", 0o022), ("b", 0o077)):
        before = os.umask(mask)
        path = save(tmp_path / folder, 1, *content(1))
        os.umask(before)
        assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~mask}


def test_nothing_saved_is_a_pickle(tmp_path):
    for file in save(tmp_path, 1, *content(1)).iterdir():
        data = file.read_bytes()
        assert data[:1] == b"{" or file.suffix == ".safetensors" and data[8:9] == b"{"


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10, 100):
        save(tmp_path, step, *content(step), keep=3, protect={1})
    assert names(tmp_path) == [f"step-{step:08d}" for step in (1, 3, 10, 100)]
    assert latest_good(tmp_path).step == 100
    save(tmp_path, 20, *content(20), keep=1)  # taken back to an earlier step: what came later is not pruned for it
    assert names(tmp_path) == ["step-00000020", "step-00000100"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, *content(6), keep=1)
    save(tmp_path, 5, *content(5), keep=1)
    assert is_content(latest_good(tmp_path)) and names(tmp_path) == ["step-00000005"]


def test_latest_good_is_none_without_checkpoints(tmp_path):
    assert latest_good(tmp_path) is None and latest_good(tmp_path / "absent") is None
    (tmp_path / "step-final").mkdir()
    for name in ("notes.txt", "step-00000007"):
        (tmp_path / name).write_text("x")
    assert latest_good(tmp_path) is None


@pytest.mark.parametrize("wrong", ["../up", "Model", "a/b", ""])
def test_a_group_is_a_plain_name(tmp_path, wrong):
    with pytest.raises(ValueError, match="is no name"):
        save(tmp_path, 1, {wrong: {}}, {})


def test_only_damaged_checkpoints_raise(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step, *content(step)) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint is intact.*00000002/state.json.*00000001/state.json"):
        latest_good(tmp_path)


def test_states_that_are_no_json_are_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, 1, content(1)[0], {"loss": float("nan")})
    assert names(tmp_path) == []


def test_identity_names_both_values():
    saved = {"model": "abc", "seed": 1, "shape": [1, 2], "rank": 4}
    require_same_identity(saved, {"model": "abc", "seed": 1, "shape": (1, 2), "rank": 4})
    with pytest.raises(CheckpointError) as caught:
        require_same_identity(saved, {"model": "abc", "seed": 2, "shape": (1, 2), "batch_size": 8})
    for part in ("seed was 1 and is now 2", "rank was 4 and is now 'absent'", "batch_size was 'absent' and is now 8"):
        assert part in str(caught.value)
    assert "model" not in str(caught.value).split(":")[1] and "new run folder" in str(caught.value)
