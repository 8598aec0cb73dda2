"""Sets of any format on the hub, with folders of this disk in the hub's place."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_data import STRUCT, lines, pictures, png, structs, table, tar

from diffusion_align.cli import main
from diffusion_align.commands.data import fetch
from diffusion_align.data import read_pairs, read_rankings
from diffusion_align.data.hub_sets import DONE
from diffusion_align.data.images import decode_image
from diffusion_align.data.rows.raw_rows import read_bytes
from diffusion_align.data.rows.tables.text import ReadOptions


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Whole repositories under their names, as the hub's client and `datasets` find them; asked: patterns of files."""
    import huggingface_hub

    root, asked = tmp_path / "hub", []
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def snapshot(name, repo_type, cache_dir, allow_patterns=None):
        asked.append(allow_patterns)
        if not (root / name).is_dir():
            raise OSError("404")
        found = [path for pattern in allow_patterns or () for path in (root / name).rglob(pattern)]
        return str(root / name if found or allow_patterns is None else tmp_path / "empty")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    root.mkdir()
    monkeypatch.chdir(root)  # `datasets` takes a folder of that name
    return root, asked


def shades(path, **more):
    return [
        (pair.prompt, *(decode_image(read_bytes(one)).getpixel((0, 0))[0] for one in (pair.winner, pair.loser)))
        for pair in read_pairs(path, **more)[0]
    ]


ROWS = [("a cat", 1, 2), ("a dog", 3, 4)]


def image_folder(root):
    pictures(root, "1.png", "2.png", "3.png", "4.png")
    rows = [{"prompt": p, "chosen_file_name": f"{a}.png", "rejected_file_name": f"{b}.png"} for p, a, b in ROWS]
    lines(root / "metadata.jsonl", rows)


def archive(root):
    members = []
    for key, (prompt, a, b) in enumerate(ROWS):
        texts = {"label_0.txt": "1", "label_1.txt": "0", "original_prompt.txt": prompt}
        parts = {"jpg_0.png": png(a), "jpg_1.png": png(b)} | {name: text.encode() for name, text in texts.items()}
        members += [(f"{key}.{name}", data) for name, data in parts.items()]
    tar(root / "train" / "0.tar", members)


def unnamed_parquet(root):
    names = {"prompt": [p for p, *_ in ROWS], "winner": structs([a for _, a, _ in ROWS])}
    table(root / "part.parquet", **names, loser=structs([b for *_, b in ROWS]))


def arrow(root):
    columns = {"prompt": [p for p, *_ in ROWS], "chosen": structs([a for _, a, _ in ROWS])}
    values = pa.table({**columns, "rejected": structs([b for *_, b in ROWS])})
    image = {"_type": "Image"}
    features = {"prompt": {"dtype": "string", "_type": "Value"}, "chosen": image, "rejected": image}
    values = values.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    root.mkdir(parents=True)
    with pa.OSFile(str(root / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, values.schema) as writer:
        writer.write_table(values)


@pytest.mark.parametrize("make", [image_folder, archive, arrow])
def test_a_set_of_another_format_is_streamed_once(hub, tmp_path, make):
    root, asked = hub
    make(root / "me" / "set")
    found = fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache"))
    assert asked == [["*train*.parquet"]] and found.parent == tmp_path / "cache" / "streamed"
    assert shades(found) == ROWS
    written = {path: path.stat().st_mtime_ns for path in found.iterdir()}
    assert fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache")) == found
    assert {path: path.stat().st_mtime_ns for path in found.iterdir()} == written
    assert sorted(path.name for path in written) == [DONE, "train-00000.parquet"]


def pairs_and_folder(root):
    pictures(root, "images/1.png", "images/2.png", "images/3.png", "images/4.png")
    rows = [{"prompt": p, "chosen": f"images/{a}.png", "rejected": f"images/{b}.png"} for p, a, b in ROWS]
    lines(root / "pairs.jsonl", rows)


def two_folders(root):
    pictures(root, "chosen/1.png", "rejected/2.png", "chosen/3.png", "rejected/4.png")
    (root / "rejected" / "2.png").rename(root / "rejected" / "1.png")
    (root / "rejected" / "4.png").rename(root / "rejected" / "3.png")
    (root / "prompts.txt").write_text("a cat\na dog\n")


@pytest.mark.parametrize("make", [pairs_and_folder, two_folders])
def test_a_set_whose_columns_hold_no_pictures_is_downloaded_whole(hub, tmp_path, make):
    root, asked = hub
    make(root / "me" / "set")
    found = fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache"))
    assert asked == [["*train*.parquet"], None] and shades(found) == ROWS


def test_parquet_files_without_a_split_in_their_names(hub, tmp_path):
    root, _ = hub
    unnamed_parquet(root / "me" / "set")
    found = fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache"))
    assert shades(found) == ROWS


def test_rankings_are_streamed_too(hub, tmp_path):
    root, _ = hub
    images = pa.array([[{"bytes": png(n), "path": None} for n in (1, 2, 3)]], pa.list_(STRUCT))
    path = table(root / "me" / "set" / "x.parquet", prompt=["a"], images=images, relevance=[[1.0, 0.5, 0.0]])
    features = {
        "prompt": {"dtype": "string", "_type": "Value"},
        "images": {"feature": {"_type": "Image"}, "_type": "List"},
        "relevance": {"feature": {"dtype": "float64", "_type": "Value"}, "_type": "List"},
    }
    read = pq.read_table(path)
    pq.write_table(read.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)
    found = fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache"))
    (ranking,) = read_rankings(found)[0]
    assert found.parent.name == "streamed" and ranking.relevance == (1.0, 0.5, 0.0)
    assert [decode_image(read_bytes(one)).getpixel((0, 0))[0] for one in ranking.pictures] == [1, 2, 3]


def test_no_more_is_streamed_than_the_pairs_that_are_wanted(hub, tmp_path, monkeypatch):
    root, _ = hub
    many = root / "me" / "set"
    pictures(many, "1.png", "2.png")
    row = {"prompt": "p", "chosen_file_name": "1.png", "rejected_file_name": "2.png"}
    lines(many / "metadata.jsonl", [{**row, "prompt": f"p{n}"} for n in range(100)])
    monkeypatch.setattr("diffusion_align.data.hub_sets._ROWS_PER_FILE", 20)
    monkeypatch.setattr("diffusion_align.data.hub_sets._ROWS_AT_A_TIME", 10)
    some = fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache"), most=25)
    assert [pair.prompt for pair in read_pairs(some)[0]] == [f"p{n}" for n in range(40)]
    every = fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache"))
    assert every != some and len(read_pairs(every)[0]) == 100


def test_a_stream_that_breaks_leaves_no_set_behind(hub, tmp_path, monkeypatch):
    root, _ = hub
    image_folder(root / "me" / "set")
    import datasets.table

    embed = datasets.table.embed_table_storage
    monkeypatch.setattr(datasets.table, "embed_table_storage", lambda *a: (_ for _ in ()).throw(OSError("reset")))
    with pytest.raises(
        FileNotFoundError, match=r"the hub says: reset; `hf download me/set --repo-type dataset` fetches it"
    ):
        fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.table, "embed_table_storage", embed)
    assert shades(fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache"))) == ROWS


def test_a_configuration_is_the_one_that_is_read(hub, tmp_path):
    root, asked = hub
    for name, shade in (("one", 1), ("two", 5)):
        folder = root / "me" / "set" / name
        table(folder / "train-00000.parquet", prompt=["a"], chosen=structs([shade]), rejected=structs([shade + 1]))
        values = pq.read_table(folder / "train-00000.parquet")
        image = {"_type": "Image"}
        features = {"prompt": {"dtype": "string", "_type": "Value"}, "chosen": image, "rejected": image}
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(values.replace_schema_metadata(meta), folder / "train-00000.parquet")
    card = (
        "configs:\n- config_name: one\n  data_files: one/*.parquet\n- config_name: two\n  data_files: two/*.parquet\n"
    )
    (root / "me" / "set" / "README.md").write_text(f"---\n{card}---\n")
    for name, shade in (("one", 1), ("two", 5)):
        found = fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache"), config=name)
        assert shades(found) == [("a", shade, shade + 1)]
    with pytest.raises(FileNotFoundError, match="configuration three has no pictures that are compared"):
        fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache"), config="three")
    assert asked == []


def test_columns_of_a_streamed_set_are_mapped(hub, tmp_path):
    root, _ = hub
    image_folder(root / "me" / "set")
    text = (root / "me" / "set" / "metadata.jsonl").read_text()
    (root / "me" / "set" / "metadata.jsonl").write_text(text.replace("chosen_", "left_").replace("rejected_", "right_"))
    options = ReadOptions("", {"chosen": "left", "rejected": "right"})
    found = fetch.fetch_pairs("me/set", "train", str(tmp_path / "cache"), options=options)
    assert found.parent.name == "streamed" and shades(found, options=options) == ROWS


def test_a_set_that_is_not_there_is_one_line_with_the_command(hub, capsys):
    assert main(["data", "inspect", "--dataset_name", "me/none"]) == 1
    said = capsys.readouterr().err
    assert "the hub says: 404; `hf download me/none --repo-type dataset` fetches it" in said and said.count("\n") == 1


def test_reading_from_this_disk_does_not_import_datasets():
    program = "import sys, diffusion_align.commands.data.fetch; assert 'datasets' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
