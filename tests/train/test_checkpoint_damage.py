"""Checkpoints that are not what was saved: each is refused by the file's name, and nothing of it is used."""

import errno
import hashlib
import json
import os
from collections import Counter

import pytest
from helpers_checkpoint import content, is_content
from stress.checkpoint.damage import cuts, flips, refused, two_checkpoints

from diffusion_align.train.checkpoints import manifest
from diffusion_align.train.checkpoints.store import CheckpointError, latest_good, load, save


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors", "second.safetensors", "state.json"])
def test_changed_truncated_and_missing_files_are_named(tmp_path, file, caplog):
    """Each is refused by the file's name, and the checkpoint before is loaded instead."""
    path = two_checkpoints(tmp_path, 100) / file
    data = path.read_bytes()
    for damages, count in (
        (flips(data, 100), 100),
        (cuts(data), len(data)),
        (iter([data + b"\0", data + b"\n", b""]), 3),
    ):
        assert refused(path, damages) == Counter(damages=count, refused=count, unseen=0)
    assert refused(path, iter([data])) == Counter(damages=1, refused=0, unseen=1)  # no damage: the newest is loaded
    path.unlink()
    assert latest_good(tmp_path).step == 1
    assert f"{path} is missing; falling back" in caplog.text


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch, caplog):
    """A bad sector: the one file of the newest checkpoint gives an input/output error."""
    for step in (1, 2):
        save(tmp_path, step, *content(step))
    digest = hashlib.file_digest

    def bad_sector(stream, name):
        if "00000002/model" in stream.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", bad_sector)
    assert latest_good(tmp_path).step == 1
    assert "step-00000002/model.safetensors cannot be read (Input/output error); falling back" in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        [], {}, None, {"format": 1}, {"format": 1, "step": 1}, {"format": 1, "step": 1, "files": []},
        {"format": 1, "step": 1, "files": {"state.json": 3}}, {"format": 1, "step": 1, "files": {"state.json": {}}},
        {"format": 1, "step": 1, "files": {"../state.json": {"size": 2, "sha256": ""}}},
        {"format": 1, "step": 1, "files": {}}, {"format": 1, "step": True, "files": None}, {"format": 2, "step": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_valid_manifests_with_wrong_content_are_refused(tmp_path, body):
    path = save(tmp_path, 1, *content(1))
    (path / "manifest.json").write_text(manifest._text(body))
    with pytest.raises(CheckpointError, match="this version cannot read|is missing|has format 2"):
        load(path)


def test_manifests_that_name_outside_files_are_refused(tmp_path):
    """Even where the file is there and is what the seal says."""
    path = save(tmp_path, 1, *content(1))
    (tmp_path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    body = json.loads((path / "manifest.json").read_text())["body"]
    for outside in ("../model.safetensors", str(tmp_path / "model.safetensors")):
        files = {outside if name == "model.safetensors" else name: seal for name, seal in body["files"].items()}
        (path / "manifest.json").write_text(manifest._text(body | {"files": files}))
        with pytest.raises(CheckpointError, match="model.safetensors is missing"):
            load(path)


def test_a_manifest_that_is_no_plain_file_or_nested_without_end_is_refused(tmp_path):
    path = save(tmp_path, 1, *content(1)) / "manifest.json"
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        load(path.parent)
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        load(path.parent)


def test_a_directory_of_another_name_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="best is no checkpoint: their names are step- and eight digits"):
        load(save(tmp_path, 1, *content(1)).rename(tmp_path / "best"))


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    """Loaded tensors may not be views of a file that a later save removes."""
    path = save(tmp_path, 1, *content(1))
    loaded = load(path)
    with (path / "model.safetensors").open("r+b") as file:
        file.write(bytes((path / "model.safetensors").stat().st_size))
    assert is_content(loaded)


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
