"""A dead network: local commands neither need it nor look for it; what is missing is named with what fetches it."""

import socket

import pytest
from stress.offline import ENVIRONMENTS, guard, in_process

from diffusion_align.rewards import load_reward
from diffusion_align.rewards.clip import fetch_command


# All commands in the harder case, for without HF_HUB_OFFLINE nothing holds the hub's client back.
@pytest.mark.parametrize("name, only", [("a proxy that nobody answers", None), ("HF_HUB_OFFLINE=1", "train dpo")])
def test_no_local_command_tries_to_reach_anything(name, only, tmp_path):
    told = in_process(tmp_path / "run", ENVIRONMENTS[name], only=only)
    assert only or (told["modules"] > 150 and len(told["codes"]) == 6)
    assert set(told["codes"].values()) == {0}, told["stderr"][-2000:]
    assert told["attempts"] == [] and told["first"] > 0


@pytest.fixture
def attempts(monkeypatch):
    """A guarded process, as far as one test goes."""
    for name in ("connect", "connect_ex", "sendto", "sendmsg"):
        monkeypatch.setattr(socket.socket, name, getattr(socket.socket, name))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr"):
        monkeypatch.setattr(socket, name, getattr(socket, name))
    attempts = []
    guard(attempts)
    return attempts


def test_the_guard_sees_an_attempt_and_lets_the_file_system_through(attempts, tmp_path):
    with pytest.raises(socket.gaierror):
        socket.create_connection(("example.org", 80))
    with socket.socket() as tcp, pytest.raises(ConnectionRefusedError):
        tcp.connect(("127.0.0.1", 9))
    with socket.socket(type=socket.SOCK_DGRAM) as udp, pytest.raises(ConnectionRefusedError):
        udp.sendto(b"?", ("127.0.0.1", 53))
    assert len(attempts) == 3 and "example.org" in attempts[0]
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "s"))
        server.listen()
        client.connect(str(tmp_path / "s"))
    assert len(attempts) == 3


@pytest.mark.parametrize(
    "reward, repo",
    [
        ("clipscore", "timm/vit_large_patch14_clip_224.openai"),
        ("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("ViT-B-32:laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
    ],
)
def test_a_missing_clip_model_is_named_with_its_download_command(attempts, reward, repo, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("open_clip.create_model_from_pretrained", _not_cached)
    with pytest.raises(FileNotFoundError) as error:
        load_reward(reward, device="cpu")
    said = str(error.value)
    assert "\n" not in said and f"run `hf download {repo}`" in said and "HF_HUB_OFFLINE unset" in said
    assert attempts == []


def _not_cached(*args, **kwargs):
    raise RuntimeError("Failed to download weights:\nnot in the local cache")


def test_only_what_the_hub_has_is_to_be_fetched(tmp_path):
    assert fetch_command(f"local-dir:{tmp_path}", None) is None
    assert fetch_command("ViT-B-32", str(tmp_path / "weights.pt")) is None
    assert fetch_command("hf-hub:owner/name@v2", None) == "hf download owner/name --revision v2"
