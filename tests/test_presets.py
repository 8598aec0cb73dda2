"""Presets need nothing but a network: each names what it takes, and `presets check` says what of that is here."""

import hashlib
import io
import json
import socket
import urllib.request

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from diffusion_align import cli, origins
from diffusion_align.commands.presets_check import needs_of, report
from diffusion_align.commands.prompt_lists import listed_prompts
from diffusion_align.commands.train.items import source_path
from diffusion_align.data import fetched_prompts
from diffusion_align.data.bad_rows import DataError
from diffusion_align.methods import rankdpo
from diffusion_align.options import VERBS, TrainRankdpo, all_presets, resolve
from diffusion_align.rewards.catalogue import CATALOGUE
from diffusion_align.rewards.spec import read_spec

COMMIT = "fd163b223b6faf112eccafeabe2e31a0e950f177"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's client, and a machine that cannot open a connection."""

    def connect(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def put(kind, repo, *files, content=b"x"):
        home = tmp_path / "hub" / f"{kind}--{repo.replace('/', '--')}"
        for name in files:
            path = home / "snapshots" / COMMIT / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(COMMIT)
        return home / "snapshots" / COMMIT

    return put


@pytest.mark.parametrize("name", all_presets())
def test_every_preset_names_its_data_prompts_and_reward_with_their_licence(name):
    """Nothing is added on the command line, and no name is one that the tables do not know."""
    method, _, bare = name.partition("/")
    verb = VERBS[f"train {method}"]
    options = resolve(verb.options, verb.words, preset=bare).options
    verb.check(options)
    assert options.pretrained_model_name_or_path in origins.MODELS
    if hasattr(options, "prompts"):
        assert options.prompts == "tiny" or options.prompts in {**origins.PROMPT_LISTS, **origins.SHIPPED}
        if getattr(options, "preference_model", None) is None:
            assert options.reward is not None and {p.kind for p in read_spec(options.reward).parts} <= set(CATALOGUE)
        else:
            assert options.preference_model in origins.STEP_AWARE
    else:
        assert (options.dataset_name or options.train_data_dir) in origins.DATA_SETS
    for need in needs_of(name):
        assert need.licence and "not known" not in need.licence and (need.here or need.how), need


def states(preset):
    return {need.what: need.here for need in needs_of(preset)}


def test_presets_check_reads_the_cache_without_network(cache, capsys, tmp_path):
    assert cli.main(["presets", "check", "spo/sd15"]) == 0
    said = capsys.readouterr().out
    assert "spo/sd15: 0 of 3 here; the run fetches the rest" in said
    assert "about 5.5 GB" in said and "licence: CreativeML Open RAIL-M" in said
    file = "sd-v1-5_step-aware_preference_model.bin"
    assert f"`hf download SPO-Diffusion-Models/Step-Aware_Preference_Models {file}`" in said
    cache("models", "SPO-Diffusion-Models/Step-Aware_Preference_Models", "sdxl_step-aware_preference_model.bin")
    assert not states("spo/sd15")["preference model"] and states("spo/sdxl")["preference model"]
    cache("models", "SPO-Diffusion-Models/Step-Aware_Preference_Models", file)
    assert states("spo/sd15") == {"model": False, "prompts": False, "preference model": True}
    path = fetched_prompts.web_cache("spo-4k")
    path.parent.mkdir(parents=True)
    path.write_text("[]")
    assert states("spo/sd15")["prompts"]
    cache("models", "xswu/HPSv2", "HPS_v2_compressed.pt")
    assert states("prdp/sd15")["reward"] and not states("prdp/sdxl")["prompts"]
    cache("datasets", "ymhao/HPDv2", "train.json")
    assert states("prdp/sdxl") == {"model": False, "prompts": True, "reward": True}


def test_partial_downloads_count_as_missing(cache):
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    snapshot = cache("models", model, "unet/x.safetensors", "vae/x.safetensors", "text_encoder/config.json")
    index = {"unet": [], "vae": [], "text_encoder": []}
    (snapshot / "model_index.json").write_text(json.dumps(index))
    assert not states("dpo/sd15-lora")["model"]
    (snapshot / "text_encoder" / "model.safetensors").symlink_to("../../blobs/absent")  # a download that broke off
    assert not states("dpo/sd15-lora")["model"]
    cache("models", model, "text_encoder/other.safetensors")
    assert states("dpo/sd15-lora")["model"]
    name = "yuvalkirstain/pickapic_v2"
    cache("datasets", name, "data/train-00000-of-00002-a.parquet", "data/test-00000-of-00001-a.parquet")
    assert not states("dpo/sd15-lora")["data"]
    cache("datasets", name, "data/train-00001-of-00002-b.parquet")
    assert states("dpo/sd15-lora") == {"model": True, "data": True}
    assert report(["dpo/sd15-lora"])[0] == "dpo/sd15-lora: all of it is here"


def test_needs_that_no_run_downloads_name_their_command(cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    head, *lines = report(["rankdpo/sdxl"])
    assert "must be made or installed first" in head
    assert "`diffusion-align data synth --models" in lines[1] and "missing" in lines[1]
    with pytest.raises(FileNotFoundError, match="it is not published; `diffusion-align data"):
        source_path(rankdpo.METHOD, TrainRankdpo(train_data_dir="syn-pic"))
    (tmp_path / "syn-pic").mkdir()
    assert states("rankdpo/sdxl")["data"]
    assert source_path(rankdpo.METHOD, TrainRankdpo(train_data_dir="syn-pic")) is not None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set, so a run fetches nothing" in report(["dpo/sd15-full"])[0]


def test_the_animals_are_forty_five():
    animals = [prompt.text for prompt in listed_prompts("animals")]
    assert len(animals) == len(set(animals)) == 45 and animals[0] == "cat" and animals[-1] == "kangaroo"


def test_prompts_of_preferences_are_taken_once(cache, monkeypatch, tmp_path):
    hub = tmp_path / "hub"
    rows = [{"prompt": p, "file_path": ["a", "b"], "human_preference": [0, 1]} for p in ("x", "y", " x", "", "z")]
    cache("datasets", "ymhao/HPDv2", "train.json", content=json.dumps(rows).encode())
    for name, captions in (("0", ["one", "two", "one"]), ("1", ["two", "three"])):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"are_different": [True] * len(captions), "caption": captions}), sink)
        known = origins.PROMPT_LISTS["pickapic-v2"]
        cache("datasets", known.repo, known.files[name], content=sink.getvalue().to_pybytes())
    real = fetched_prompts.__dict__["_file"]

    def file(asked, name, revision):
        found = hub / f"datasets--{asked.benchmark.repo.replace('/', '--')}" / "snapshots" / COMMIT / name
        return found if found.is_file() else real(asked, name, revision)

    monkeypatch.setattr(fetched_prompts, "_file", file)
    assert [prompt.text for prompt in listed_prompts("hpdv2-train")] == ["x", "y", "z"]
    found = listed_prompts("pickapic-v2")
    assert [prompt.text for prompt in found] == ["one", "two", "three"] and found[0].categories == ()
    with pytest.raises(DataError, match="pickapic-v2 has no category 0; it has none"):
        listed_prompts("pickapic-v2/0")


def test_a_list_on_the_web_is_fetched_once_and_must_be_the_known_file(cache, monkeypatch, tmp_path):
    data = json.dumps([{"caption": "a cat", "trainset_idx": 1}, {"caption": "a dog", "trainset_idx": 2}]).encode()
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(data)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(DataError, match="is not the file that was published"):
        listed_prompts("spo-4k")
    assert not fetched_prompts.web_cache("spo-4k").exists()
    known = origins.PROMPT_LISTS["spo-4k"]
    changed = {**vars(known), "sha256": hashlib.sha256(data).hexdigest()}
    monkeypatch.setitem(origins.PROMPT_LISTS, "spo-4k", origins.PromptList(**changed))
    assert [prompt.text for prompt in listed_prompts("spo-4k")] == ["a cat", "a dog"]
    assert len(listed_prompts("spo-4k")) == 2 and len(asked) == 2
    assert asked[0].startswith("https://raw.githubusercontent.com/RockeyCoss/SPO/") and asked[0].endswith(".json")
    fetched_prompts.web_cache("spo-4k").write_bytes(b"other")
    with pytest.raises(DataError, match="is damaged: remove it"):
        listed_prompts("spo-4k")
    fetched_prompts.web_cache("spo-4k").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="give its path in place of spo-4k"):
        listed_prompts("spo-4k")
