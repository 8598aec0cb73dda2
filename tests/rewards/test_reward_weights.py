"""Untrusted files of weights: read without running their code, refused in one line."""

import hashlib
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from diffusion_align.rewards.weight_files import locate, read_weights, require_digest, require_fit, web_file


class Bomb:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["HPS_v2_compressed.pt", "ImageReward.pt", "head.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, name, nested, legacy):
    canary, path = tmp_path / "canary", tmp_path / name
    bomb = {"layers.0.weight": torch.zeros(2), "x": Bomb(canary)}
    torch.save({"state_dict": bomb} if nested else bomb, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="is refused: it does not hold weights alone") as caught:
        read_weights(path)
    assert not canary.exists()
    assert "weights_only" not in str(caught.value) and len(str(caught.value).splitlines()) == 1
    torch.load(path, weights_only=False)  # without the protection the code runs
    assert canary.exists()


def test_a_bare_pickle_and_damaged_files_are_refused(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Bomb(canary)))
    torch.save({"a": torch.zeros(1000)}, tmp_path / "b.pt")
    (tmp_path / "b.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:700])
    (tmp_path / "c.pt").write_bytes(b"")
    for name in "abc":
        with pytest.raises(ValueError, match="is refused"):
            read_weights(tmp_path / f"{name}.pt")
    (tmp_path / "d.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_weights(tmp_path / "d.safetensors")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "none.pt")
    assert not canary.exists()


def test_weights_come_back_as_they_were(tmp_path):
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.float16)}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pt")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "trained.pt")
    for name in ("w.safetensors", "w.pt", "trained.pt"):
        read = read_weights(tmp_path / name)
        assert set(read) == {"a", "b"} and torch.equal(read["b"], weights["b"]) and read["b"].dtype == torch.float16


@pytest.mark.parametrize(
    ("content", "message"),
    [([torch.zeros(1)], "holds a list"), ({"a": 1}, "'a' is a int, not a tensor"), ({3: torch.zeros(1)}, "'3' is a")],
)
def test_files_without_a_dictionary_of_tensors_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "w.pt")


def test_the_first_wrong_key_is_named():
    due = {"a": (2,), "b": (1, 3)}
    good = {"a": torch.zeros(2), "b": torch.zeros(1, 3)}
    require_fit(good, due, "x")
    for wrong, message in (
        (good | {"c": torch.zeros(1)}, r"x: unknown key 'c' \(1 of 3 are\)"),
        ({"b": good["b"]}, r"x: key 'a' is missing \(1 of 2 are\)"),
        (good | {"b": torch.zeros(3, 1)}, r"'b' has shape \[3, 1\], not \[1, 3\]"),
        (good | {"a": torch.tensor([0, torch.inf])}, "'a' is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            require_fit(wrong, due, "x")


def test_wrong_digest_is_refused(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    require_digest(path, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(ValueError, match=f"its sha256 is {hashlib.sha256(b'weights').hexdigest()}, not 00"):
        require_digest(path, "0" * 64)


def test_downloads_are_cached_and_their_digest_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    asked = []

    def download(url, target, hash_prefix, progress):
        asked.append(url)
        with open(target, "wb") as file:
            file.write(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    digest = hashlib.sha256(b"weights").hexdigest()
    for _ in range(2):
        assert web_file("https://example.com/a/w.pth", digest).read_bytes() == b"weights"
    assert len(asked) == 1
    with pytest.raises(ValueError, match="not the file that was published"):
        web_file("https://example.com/a/w.pth", "0" * 64)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        web_file("https://example.com/a/w.pth", "1" * 64)
    assert len(asked) == 2


def test_a_local_path_is_a_file_or_a_folder_of_published_names(tmp_path):
    (tmp_path / "second").write_bytes(b"")
    assert locate(str(tmp_path), ("first", "second"), "o/n") == tmp_path / "second"
    assert locate(str(tmp_path / "second"), ("first",), "o/n") == tmp_path / "second"
    with pytest.raises(FileNotFoundError, match="holds none of first"):
        locate(str(tmp_path), ("first",), "o/n")
