"""Hostile weights of rewards, for `reward score`."""

import io
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stress.hostile.cases import Evaluated, case, write

HPS, HEAD = "HPS_v2.1_compressed.pt", "sac+logos+ava1-l14-linearMSE.pth"

VOCABULARY = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"


def score(home: Path, reward: str) -> list[str]:
    """The command that scores one picture."""
    (home / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(home / "pictures" / "0.png")
    write(home / "prompts.txt", "a red circle\n")
    return ["reward", "score", "--reward", reward, "--images", str(home / "pictures"), "--prompts_file",
            str(home / "prompts.txt"), "--device", "cpu", "--out", str(home / "scores.jsonl")]  # fmt: skip


def saved(path: Path, content: object, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def rezipped(path: Path, change) -> Path:
    """A torch zip written again, each member through `change(archive, name, data)`."""
    buffer = io.BytesIO()
    torch.save({"visual.proj": torch.zeros(1 << 10)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            change(new, member.filename, old.read(member))
    return path


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@case
def a_torch_zip_that_calls_the_shell(home, trap):
    return score(home, f"hpsv2.1={saved(home / HPS, {'visual.proj': trap})}")


@case
def code_in_a_nested_state_dict(home, trap):
    inner = OrderedDict(a=torch.zeros(1), b={"c": [OrderedDict(d=trap)]})
    return score(home, f"hpsv2.1={saved(home / HPS, {'state_dict': inner})}")


@case
def the_old_torch_format_that_calls_the_shell(home, trap):
    return score(home, f"hpsv2={saved(home / 'other.pt', {'x': trap}, legacy=True)}")


@case
def a_bare_pickle(home, trap):
    write(home / "vocab.txt", VOCABULARY)
    write(home / "ImageReward.pt", pickle.dumps(trap, 2))
    return score(home, f"imagereward={home}")


@case
def a_pickle_that_evaluates(home, trap):
    saved(home / "pytorch_model.bin", {"logit_scale": Evaluated(trap.canary)})
    return score(home, f"pickscore={home}")


@case
def an_array_of_objects(home, trap):
    return score(home, f"hpsv2.1={saved(home / HPS, {'x': np.array([trap], dtype=object)})}")


@case
def an_npy_of_objects(home, trap):
    buffer = io.BytesIO()
    np.save(buffer, np.array([trap], dtype=object))
    return score(home, f"hpsv2.1={write(home / HPS, buffer.getvalue())}")


@case
def an_npz_of_objects(home, trap):
    buffer = io.BytesIO()
    np.savez(buffer, x=np.array([trap], dtype=object))
    return score(home, f"hpsv2.1={write(home / HPS, buffer.getvalue())}")


@case
def a_whole_module(home, trap):
    module = torch.nn.Linear(2, 2)
    module.trap = trap  # type: ignore[assignment]
    return score(home, f"aesthetic={saved(home / 'head.pth', module)}")


@case
def the_published_head_with_other_bytes(home, trap):
    return score(home, f"aesthetic={saved(home / HEAD, {'layers.0.weight': torch.zeros(1024, 768)})}")


@case
def a_zip_bomb(home, trap):
    def change(archive, name, data):
        if "/data/" in name:
            archive.writestr(name, bytes(1 << 30), zipfile.ZIP_DEFLATED)
        else:
            archive.writestr(name, data)

    return score(home, f"hpsv2.1={rezipped(home / HPS, change)}")


@case
def a_zip_with_one_name_twice(home, trap):
    def change(archive, name, data):
        archive.writestr(name, data)
        if name.endswith("data.pkl"):
            archive.writestr(name, pickle.dumps(trap))

    return score(home, f"hpsv2.1={rezipped(home / HPS, change)}")


@case
def a_zip_with_paths(home, trap):
    def change(archive, name, data):
        archive.writestr(name, data)
        if name.endswith("data.pkl"):
            archive.writestr("../../canary", b"x")

    return score(home, f"hpsv2.1={rezipped(home / HPS, change)}")


@case
def a_tensor_of_a_trillion_values_on_one(home, trap):
    return score(home, f"hpsv2.1={saved(home / HPS, {'visual.proj': torch.zeros(1).expand(10**6, 10**6)})}")


@case
def a_storage_of_a_terabyte(home, trap):
    def change(archive, name, data):
        archive.writestr(name, data.replace(b"M\x00\x04", b"\x8a\x05\x00\x00\x00\x00\x40"))

    return score(home, f"hpsv2.1={rezipped(home / HPS, change)}")


@case
def an_old_storage_of_a_terabyte(home, trap):
    data = saved(home / "x.pt", {"visual.proj": torch.zeros(1 << 10)}, legacy=True).read_bytes()
    data = data.replace(b"M\x00\x04", b"\x8a\x05\x00\x00\x00\x00\x40")
    return score(home, f"hpsv2.1={write(home / HPS, data)}")


@case
def a_tensor_without_values(home, trap):
    return score(home, f"hpsv2.1={saved(home / HPS, {'visual.proj': torch.empty(10**9, device='meta')})}")


@case
def a_sparse_tensor(home, trap):
    sparse = torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (10**6, 10**6))
    return score(home, f"hpsv2.1={saved(home / HPS, {'visual.proj': sparse})}")


@case
def a_program_of_torchscript(home, trap):
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    torch.jit.save(torch.jit.script(Doubled()), str(home / "clip.pt"))
    return score(home, f"ViT-B-32:{home / 'clip.pt'}")


@case
def a_tar_of_the_oldest_torch(home, trap):
    with tarfile.open(home / HPS, "w") as archive:
        for name in ("pickle", "storages", "../../canary"):
            data = pickle.dumps(trap)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return score(home, f"hpsv2.1={home / HPS}")


@case
def safetensors_of_an_absurd_shape(home, trap):
    text = b'{"logit_scale":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}'
    write(home / "model.safetensors", header(text, bytes(4)))
    return score(home, f"pickscore={home}")


@case
def safetensors_with_an_endless_header(home, trap):
    write(home / "model.safetensors", struct.pack("<Q", 1 << 60) + b"{}")
    return score(home, f"pickscore={home}")


@case
def safetensors_with_a_nested_header(home, trap):
    write(home / "model.safetensors", header(b'{"a":' + b"[" * 10**6))
    return score(home, f"pickscore={home}")


@case
def safetensors_over_one_another(home, trap):
    one = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    write(home / "model.safetensors", header(f'{{"a":{one},"b":{one}}}'.encode(), bytes(4)))
    return score(home, f"pickscore={home}")
