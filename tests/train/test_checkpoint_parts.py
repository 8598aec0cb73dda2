"""Parts: what other processes of a job add to a checkpoint."""

import os

import pytest
import torch
from helpers_checkpoint import content, is_content, names

from diffusion_align.train.checkpoints.store import CheckpointError, latest_good, load, save, write_part


def test_parts_of_other_ranks_become_groups_in_the_manifest(tmp_path):
    tensors, state = content(1)
    parts = [write_part(tmp_path, name, {"draws": torch.full((3,), float(i))}) for i, name in enumerate(["r1", "r2"])]
    assert names(tmp_path) == [".part-r1.safetensors", ".part-r2.safetensors"] and latest_good(tmp_path) is None
    path = save(tmp_path, 1, tensors, state, parts=parts)
    assert names(tmp_path) == ["step-00000001"]
    loaded = load(path)
    assert is_content(loaded) and set(loaded.tensors) == {"model", "optimizer", "r1", "r2"}
    assert loaded.tensors["r2"]["draws"].tolist() == [1, 1, 1]
    data = (path / "r2.safetensors").read_bytes()
    (path / "r2.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="r2.safetensors is damaged"):
        load(path)


def test_parts_of_killed_saves_are_removed_and_current_ones_kept(tmp_path):
    write_part(tmp_path, "dead", {})
    (tmp_path / ".part-killed.tmp").mkdir()
    mine = write_part(tmp_path, "mine", {"a": torch.ones(2)})
    assert set(load(save(tmp_path, 1, *content(1), parts=[mine])).tensors) == {"model", "optimizer", "mine"}
    assert names(tmp_path) == ["step-00000001"]
    mine = write_part(tmp_path, "mine", {"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="could not be saved"):  # another process has not written its own
        save(tmp_path, 2, *content(2), parts=[mine, tmp_path / ".part-absent.safetensors"])
    assert names(tmp_path) == ["step-00000001"]


def test_a_failed_part_removes_the_older_one(tmp_path, monkeypatch):
    part = write_part(tmp_path, "rank1", {"a": torch.ones(2)})
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.read(-1, 1))  # an error of the system
    with pytest.raises(CheckpointError, match="part-rank1.safetensors: could not be saved .*Bad file descriptor"):
        write_part(tmp_path, "rank1", {"a": torch.zeros(2)})
    assert names(tmp_path) == [] and not part.exists()


@pytest.mark.parametrize("damage", ["cut", "link"])
def test_torn_or_linked_parts_are_refused(tmp_path, damage):
    part = write_part(tmp_path, "rank1", {"a": torch.ones(100)})
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-1])
    else:
        part.rename(tmp_path / "outside")
        part.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="could not be saved"):
        save(tmp_path, 1, *content(1), parts=[part])
    assert latest_good(tmp_path) is None


@pytest.mark.parametrize("where", ["other/.part-a.safetensors", "part-a.safetensors", ".part-a.pt"])
def test_parts_of_other_folders_are_refused(tmp_path, where):
    with pytest.raises(ValueError, match="is no part of a checkpoint in"):
        save(tmp_path, 1, *content(1), parts=[tmp_path / where])


def test_no_two_groups_share_a_name(tmp_path):
    part = write_part(tmp_path, "model", {})
    for tensors in ({"model": {}}, {}):
        with pytest.raises(ValueError, match="two groups of a checkpoint have the same name: model, model"):
            save(tmp_path, 1, tensors, {}, parts=[part] if tensors else [part, part])
