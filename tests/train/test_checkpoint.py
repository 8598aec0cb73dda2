"""Checkpoints: whole or absent whatever happens, every damaged byte refused, nothing in them that can run."""

import os
import random
import resource
import signal
import time

import pytest
import torch

from diffusion_align import rng
from diffusion_align.train import checkpoint
from diffusion_align.train.checkpoint import CheckpointError, latest_good, load, require_same_identity, save


def content(step, size=1000):
    """Tensors and state that differ at every step and name it."""
    values = {"a": rng.normal((size,), step, "checkpoint"), "b": torch.tensor(step), "c": torch.zeros(0, 3)}
    return {"model": values, "optimizer": {"0.step": torch.tensor(float(step))}}, {
        "step": step,
        "text": "é",
        "rate": 0.1,
    }


def is_content(loaded, size=1000):
    tensors, state = content(loaded.step, size)
    return loaded.state == state and all(
        torch.equal(loaded.tensors[group][name], value) and loaded.tensors[group][name].dtype == value.dtype
        for group, values in tensors.items()
        for name, value in values.items()
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def in_child(work):
    """Fork, run `work`, and return the child's id; the child never returns."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path / "new" / "folder", 12, *content(12))
    assert path.name == "step-00000012"
    assert names(path) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    loaded = latest_good(tmp_path / "new" / "folder")
    assert loaded.step == 12 and loaded.path == path and is_content(loaded)


def test_tensors_are_saved_as_they_look(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "model": {"t": base.T, "row": base[1], "same": base, "half": base.bfloat16(), "bytes": base.to(torch.uint8)}
    }
    loaded = load(save(tmp_path, 1, tensors, {})).tensors["model"]
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors["model"].items())


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


def test_no_checkpoint_is_none(tmp_path):
    assert latest_good(tmp_path) is None and latest_good(tmp_path / "absent") is None
    (tmp_path / "step-final").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert latest_good(tmp_path) is None


@pytest.mark.parametrize("wrong", ["../up", "Model", "a/b", ""])
def test_a_group_is_a_plain_name(tmp_path, wrong):
    with pytest.raises(ValueError, match="is no name"):
        save(tmp_path, 1, {wrong: {}}, {})


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"])
def test_flips_cuts_and_losses_are_refused_by_name(tmp_path, file, caplog):
    """Per file: 60 flipped bits, 40 cuts, one loss. Each is refused, and the checkpoint before is loaded instead."""
    chance = random.Random(file)
    save(tmp_path, 1, *content(1))
    path = save(tmp_path, 2, *content(2)) / file
    data = path.read_bytes()
    damages = [data[:length] for length in {chance.randrange(len(data)) for _ in range(40)}]
    for bit in {chance.randrange(8 * len(data)) for _ in range(60)}:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damages.append(bytes(flipped))
    for damage in [*damages, None]:
        path.unlink() if damage is None else path.write_bytes(damage)
        caplog.clear()
        loaded = latest_good(tmp_path)
        if loaded.step == 2:  # white space of the manifest, which says nothing, may change
            assert file == "manifest.json" and is_content(loaded) and damage.split() != data.split()
            continue
        assert loaded.step == 1 and is_content(loaded)
        assert file in caplog.text and "step-00000002" in caplog.text and "falling back" in caplog.text
    path.write_bytes(data)
    assert latest_good(tmp_path).step == 2


def test_when_all_are_broken_nothing_starts_afresh(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step, *content(step)) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint is whole.*00000002/state.json.*00000001/state.json"):
        latest_good(tmp_path)


def test_a_renamed_or_linked_checkpoint_is_refused(tmp_path):
    path = save(tmp_path / "a", 1, *content(1))
    moved = path.rename(path.with_name("step-00000009"))
    with pytest.raises(CheckpointError, match="is of step 1: the directory was renamed"):
        load(moved)
    path = save(tmp_path / "b", 1, *content(1))
    (path / "model.safetensors").rename(tmp_path / "outside")
    (path / "model.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        load(path)


def test_killed_saves_leave_a_whole_checkpoint(tmp_path):
    """20 real SIGKILLs in a run that does nothing but save: the newest is always whole, and no save is lost twice."""
    size, reached = 100_000, 0

    def keep_saving(first):
        step, parent = first, os.getppid()
        while os.getppid() == parent:  # it must not outlive a test run that is stopped
            save(tmp_path, step, *content(step, size), keep=2)
            (tmp_path / "saved").write_text(str(step))
            step += 1

    chance = random.Random(0)
    for kill in range(20):
        child = in_child(lambda: keep_saving(reached + 1))  # noqa: B023
        before, deadline = reached, time.time() + 20
        while reached <= before and time.time() < deadline:  # one save has ended in this child
            time.sleep(0.002)
            reached = int((tmp_path / "saved").read_text() or reached) if (tmp_path / "saved").exists() else reached
        assert reached > before, "no save came through"
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = latest_good(tmp_path)
        assert loaded is not None and is_content(loaded, size), f"kill {kill}"
        reached = int((tmp_path / "saved").read_text() or loaded.step)
        assert loaded.step >= reached
        reached = loaded.step
    assert reached >= 20
    save(tmp_path, reached + 1, *content(reached + 1), keep=2)
    assert names(tmp_path) == ["saved", f"step-{reached:08d}", f"step-{reached + 1:08d}"]


@pytest.mark.parametrize("same_step", [False, True], ids=["next", "again"])
def test_dying_before_any_file_operation_loses_nothing(tmp_path, same_step):
    """The process dies before its n-th write, sync, rename or removal, for every n until the save comes through."""
    operations = [
        (os, "replace"),
        (os, "fsync"),
        (os, "mkdir"),
        (os, "rmdir"),
        (os, "unlink"),
        (checkpoint.safetensors.torch, "save_file"),
    ]

    def die_before(n, folder, step):
        left = [n]
        for module, name in operations:
            real = getattr(module, name)

            def dying(*args, real=real, **options):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return real(*args, **options)

            setattr(module, name, dying)
        save(folder, step, *content(step), keep=1)

    n, status = 0, 9
    while status != 0:
        folder = tmp_path / str(n)
        save(folder, 1, *content(1), keep=1)
        step = 1 if same_step else 2
        child = in_child(lambda: die_before(n, folder, step))  # noqa: B023
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        loaded = latest_good(folder)
        assert loaded is not None and is_content(loaded), f"died before operation {n}"
        save(folder, 3, *content(3), keep=1)
        assert names(folder) == ["step-00000003"]
        n += 1
    assert n > 12 and loaded.step == step


def test_a_full_disk_fails_the_save_only(tmp_path):
    """A limit on the size of files stands in for the disk; the save says so, cleans up, and the next one works."""
    save(tmp_path, 1, *content(1))

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            save(tmp_path, 2, *content(2, 1_000_000))
        except CheckpointError as error:
            assert "step-00000002: could not be saved" in str(error) and "untouched" in str(error)
            assert names(tmp_path) == ["step-00000001"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            save(tmp_path, 3, *content(3))

    os.waitpid(in_child(limited), 0)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    assert latest_good(tmp_path).step == 3


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


def test_identity_names_both_values():
    saved = {"model": "abc", "seed": 1, "shape": [1, 2], "rank": 4}
    require_same_identity(saved, {"model": "abc", "seed": 1, "shape": (1, 2), "rank": 4})
    with pytest.raises(CheckpointError) as caught:
        require_same_identity(saved, {"model": "abc", "seed": 2, "shape": (1, 2), "batch_size": 8})
    for part in ("seed was 1 and is now 2", "rank was 4 and is now 'absent'", "batch_size was 'absent' and is now 8"):
        assert part in str(caught.value)
    assert "model" not in str(caught.value).split(":")[1] and "new run folder" in str(caught.value)
