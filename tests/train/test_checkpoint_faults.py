"""Kills, errors and full disks while a checkpoint is written: what was there before and what comes after are well.

tests/stress/checkpoints.py does the same in full counts.
"""

import errno
import json
import os
import shutil
from collections import Counter

import pytest
import torch
from helpers_checkpoint import content, is_content, names
from stress.checkpoint.disks import full_disks, limited_files
from stress.checkpoint.faults import deaths, errors
from stress.checkpoint.kills import kills

from diffusion_align.train.checkpoints import store as checkpoint
from diffusion_align.train.checkpoints.store import CheckpointError, latest_good, load, save, write_part


def test_killed_saves_leave_a_complete_checkpoint(tmp_path):
    """20 real SIGKILLs in a run that does nothing but save: the newest is always whole, and no save is lost twice."""
    found = kills(tmp_path, 20, 100_000)
    assert found.pop("inside") > 0, "no kill came in the middle of a save"
    assert found == Counter(kills=20, unloadable=0, lost=0, offered=0, left=0)


@pytest.mark.parametrize("way", ["again", "parts"])
def test_dying_before_any_file_operation_loses_nothing(tmp_path, way):
    """The process dies before its n-th file operation, for every n until the save comes through."""
    found = deaths(tmp_path, way)
    assert found.pop("operations") > 30
    assert found == Counter(broken=0, offered=0, left=0)


@pytest.mark.parametrize(("way", "lasting"), [("again", False), ("parts", False), ("parts", True)])
def test_an_error_of_any_file_operation_fails_the_save_only(tmp_path, way, lasting):
    """It is reported, or it came after the checkpoint was durable; what was there before and the next save are well."""
    found = errors(tmp_path, way, errno.ENOSPC, lasting, every=3)
    assert found.pop("operations") > found.pop("reported") > 8
    assert found == Counter(wrong=0, broken=0, offered=0, left=0)


def test_files_that_cannot_grow_fail_the_save_only(tmp_path):
    assert limited_files(tmp_path, 6, 20_000) == Counter(points=6, reported=6, wrong=0, broken=0)


@pytest.mark.parametrize("checked", [False, True], ids=["written until it is full", "looked at before"])
def test_a_full_disk_fails_the_save_only(tmp_path, checked):
    found = full_disks(tmp_path / "disk", 6, 50_000, checked)
    if found is None:
        pytest.skip("only root may mount a small disk")
    assert found == Counter(points=6, reported=6, wrong=0, broken=0)


def test_a_replaced_checkpoint_survives_a_killed_and_a_failed_save(tmp_path, monkeypatch):
    """Death between the two renames, and then no room: the one checkpoint there is has its name back."""
    path = save(tmp_path, 1, *content(1))
    path.rename(tmp_path / ".old-step-00000001")
    assert is_content(latest_good(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(CheckpointError, match="0 are free"):
        save(tmp_path, 2, *content(2))
    assert names(tmp_path) == ["step-00000001"] and is_content(load(path))


def test_too_little_disk_space_is_reported_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 1, *content(1))
    tensors, state = content(2)
    # 1000 floats, an int64 and a float; the state as it is written; a MiB to spare.
    needed = 4000 + 8 + 4 + len(json.dumps(state, indent=1)) + 2**20
    usage, written = shutil.disk_usage(tmp_path), []
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *_: written.append(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(CheckpointError, match=f"step-00000002: .*needs {needed} bytes and {needed - 1} are free: make"):
        save(tmp_path, 2, tensors, state)
    with pytest.raises(CheckpointError, match=r"part-rank1.*needs 1052588 bytes and 5 are free"):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5))
        write_part(tmp_path, "rank1", {"a": torch.zeros(1003)})
    assert names(tmp_path) == ["step-00000001"] and not written
    monkeypatch.undo()
    for enough in ({"free": needed}, {"free": 0, "total": 0}):  # no total: a file system that does not say
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(**enough))  # noqa: B023
        save(tmp_path, 2, tensors, state)
    assert latest_good(tmp_path).step == 2


def test_everything_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    """In the order of events: each file and the staged directory are synced, then renamed, then the folder is synced;
    only then does the old checkpoint go. A folder that is new is synced into its own."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("rename", str(b))), replace(a, b)))
    folder = tmp_path / "run"
    path = save(folder, 1, *content(1), keep=1)
    assert done[0] == ("sync", str(tmp_path))
    done.clear()
    path = save(folder, 2, *content(2), keep=1, parts=[write_part(folder, "rank1", {"a": torch.ones(2)})])
    appeared, gone = done.index(("rename", str(path))), done.index(("rename", str(folder / ".tmp-gone-step-00000001")))
    staged = folder / ".tmp-step-00000002"
    synced = [what for how, what in done[:appeared] if how == "sync"]
    assert {str(staged / name) for name in names(path)} <= set(synced) and synced[-1] == str(staged)
    assert len(names(path)) == 5 and done[appeared + 1 : gone] == [("sync", str(folder))]
    assert done[:2] == [
        ("sync", str(folder / ".part-rank1.tmp" / ".part-rank1.safetensors")),
        ("rename", str(folder / ".part-rank1.safetensors")),
    ]


@pytest.mark.parametrize(("code", "fails"), [(5, True), (22, False)], ids=["EIO", "EINVAL"])
def test_a_failed_sync_fails_the_save_but_an_unsupported_one_does_not(tmp_path, monkeypatch, code, fails):
    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if fails:
        with pytest.raises(CheckpointError, match="could not be saved"):
            save(tmp_path, 1, *content(1))
        assert latest_good(tmp_path) is None
    else:
        assert is_content(load(save(tmp_path, 1, *content(1))))


def test_links_are_removed_and_not_followed(tmp_path):
    outside = save(tmp_path / "outside", 1, *content(1))
    folder = tmp_path / "run"
    save(folder, 2, *content(2))
    for name in ("step-00000001", ".tmp-step-00000003", ".tmp-x", ".part-x.safetensors"):
        (folder / name).symlink_to(outside)
    save(folder, 3, *content(3), keep=1)
    assert names(folder) == ["step-00000003"] and is_content(load(outside))


def test_files_that_cannot_be_removed_cause_a_warning(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1, *content(1))
    replace = os.replace

    def guarded(source, target):
        if source.name == "step-00000001":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, target)

    monkeypatch.setattr(os, "replace", guarded)
    save(tmp_path, 2, *content(2), keep=1)
    assert latest_good(tmp_path).step == 2
    assert "step-00000001 could not be renamed to .tmp-gone-step-00000001 ([Errno 13] Permission denied)" in caplog.text
