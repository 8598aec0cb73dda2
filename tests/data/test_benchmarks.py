"""Lists that are fetched by name, out of a hub's cache on this disk in the hub's own form, and none of it online."""

import json

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_align import cli
from diffusion_align.commands.prompt_lists import by_category, evaluation_prompts, listed_prompts
from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.fetched_prompts import fetch_list, requested_list
from diffusion_align.origins import BENCHMARKS

COMMIT, OLDER = "fd163b223b6faf112eccafeabe2e31a0e950f177", "0" * 39 + "1"
REAL = huggingface_hub.hf_hub_download


def parquet(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def texts(name, count=3):
    return [f"{name} prompt {i}" for i in range(count)]


FILES = {
    "ymhao/HPDv2": {
        f"benchmark/{style}.json": json.dumps(texts(style)).encode()
        for style in ("anime", "concept-art", "paintings", "photo")
    },
    "Jialuo21/DrawBench": {
        "data/test-00000-of-00001.parquet": parquet(prompts=texts("draw"), category=["Colors", "Colors", "DALL-E"])
    },
    "Jialuo21/DPG-Bench": {
        "data/test-00000-of-00001.parquet": parquet(
            item_id=["0", "midjourney32", "vrd5"], prompt=texts("dpg"), questions=[[{"question": "?"}], [], []]
        )
    },
    # The configurations' files are named by what follows their first underscore: 3d_spatial_val/spatial_val-....
    "NinaKarine/t2i-compbench": {
        f"{config}/{split}-00000-of-00001.parquet": parquet(text=texts(config))
        for config, split in [
            *((f"{name}_val", "val") for name in ("color", "shape", "texture", "spatial", "numeracy", "complex")),
            ("3d_spatial_val", "spatial_val"),
            ("non_spatial_val", "spatial_val"),
        ]
    },
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache as the hub's client keeps it, read by that client itself, which is offline."""

    def put(repo, commit, files):
        home = tmp_path / f"datasets--{repo.replace('/', '--')}"
        for name, data in files.items():
            path = home / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(COMMIT)

    for repo, files in FILES.items():
        put(repo, COMMIT, files)
    put("ymhao/HPDv2", OLDER, {"benchmark/photo.json": b'["an older photo"]'})
    asked = []

    def download(repo, name, **options):
        asked.append((repo, name, options))
        return REAL(repo, name, cache_dir=tmp_path, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_a_list_by_name_has_its_prompts_its_origin_and_its_licence(hub, capsys, name):
    prompts, known = listed_prompts(name), BENCHMARKS[name]
    assert len(prompts) == 3 * len(known.files) == len({prompt.text for prompt in prompts})
    for prompt in prompts:
        origin = {"list": name, "source": f"{known.repo}@{COMMIT}", "licence": known.licence}
        assert origin.items() <= prompt.extra.items()
        json.dumps(prompt.extra)
    said = capsys.readouterr().out
    assert known.licence in said and f"{known.repo}@{COMMIT}" in said and f"{len(prompts)} from" in said
    assert {repo for repo, *_ in hub} == {known.repo} and len(hub) == len(known.files)
    assert all(options["repo_type"] == "dataset" for *_, options in hub)


def test_categories_of_prompts(hub):
    assert {key: len(places) for key, places in by_category(listed_prompts("hpdv2")).items()} == {
        f"style: {style}": 3 for style in ("anime", "concept-art", "paintings", "photo")
    }
    assert list(by_category(listed_prompts("drawbench"))) == ["category: Colors", "category: DALL-E"]
    found = listed_prompts("t2i-compbench")
    assert [prompt.extra["category"] for prompt in found[::3]] == [
        "color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex",
    ]  # fmt: skip
    assert [prompt.text for prompt in found if prompt.categories == ("category: 3d_spatial",)] == texts(
        "3d_spatial_val"
    )
    assert [prompt.extra["item_id"] for prompt in listed_prompts("dpg-bench")] == ["0", "midjourney32", "vrd5"]
    assert len(evaluation_prompts("hpdv2", 5)) == 5


def test_a_category_alone_and_a_revision(hub):
    assert [prompt.text for prompt in listed_prompts("hpdv2/photo")] == texts("photo") and len(hub) == 1
    older = listed_prompts(f"hpdv2/photo@{OLDER}")
    assert [prompt.text for prompt in older] == ["an older photo"]
    assert older[0].extra["source"] == f"ymhao/HPDv2@{OLDER}"


def test_all_files_of_a_list_are_of_one_commit(hub):
    """The hub's main may move between two downloads."""
    asked = requested_list("hpdv2")
    assert asked is not None
    fetch_list(asked)
    assert [options["revision"] for *_, options in hub] == [None, COMMIT, COMMIT, COMMIT]


def test_offline_and_not_cached_is_one_line_with_the_command_that_fetches(tmp_path, monkeypatch):
    def download(repo, name, **options):
        return REAL(repo, name, cache_dir=tmp_path, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError) as refused:
        listed_prompts("hpdv2@v1")
    said = str(refused.value)
    files = " ".join(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo"))
    assert f"`hf download ymhao/HPDv2 {files} --repo-type dataset --revision v1`" in said
    assert "with HF_HUB_OFFLINE unset" in said and "\n" not in said


def test_the_command_line_prints_the_same_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **o: REAL(*a, cache_dir=tmp_path, **o))
    assert cli.main(["sample", "--model", "tiny", "--prompts", "dpg-bench", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "hf download Jialuo21/DPG-Bench data/test-00000-of-00001.parquet" in error
    assert not (tmp_path / "out").exists()


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(DataError, match="hpdv2 has no category photos; it has anime, concept-art, paintings, photo"):
        listed_prompts("hpdv2/photos")
    with pytest.raises(DataError, match="drawbench has no category x; it has none"):
        listed_prompts("drawbench/x")
    with pytest.raises(FileNotFoundError, match="did you mean drawbench?"):
        listed_prompts("drawbnch")
    with pytest.raises(FileNotFoundError, match="give a file, or one of parti, geneval, animals, hpdv2"):
        listed_prompts(str(tmp_path / "absent.txt"))
    assert requested_list("owner/name") is None and requested_list("hpdv2/../../x") is None


def test_an_existing_file_goes_before_a_list_of_its_name(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpdv2").mkdir()
    (tmp_path / "hpdv2" / "1.txt").write_text("mine")
    assert [prompt.text for prompt in listed_prompts("hpdv2")] == ["mine"] and not hub
