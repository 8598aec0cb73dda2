"""Pairs from every layout; errors of one line that name file, row or key, and the cure."""

import io
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.pairs_and_rankings import Pair, fingerprint, write_pairs_parquet
from diffusion_align.data.read import read_pairs
from diffusion_align.data.rows.raw_rows import ParquetCell


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def contents(picture):
    return picture.read() if isinstance(picture, ParquetCell) else picture.read_bytes()


def write_table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def pick(tmp_path):
    """Four rows: the first picture wins, the second wins, a tie, the first wins."""
    path = tmp_path / "pick.parquet"
    jpg_0, jpg_1 = [png(i) for i in range(4)], [png(10 + i) for i in range(4)]
    write_pairs_parquet(path, list("abcd"), jpg_0, jpg_1, [1, 0, 0.5, 1], {"score_0": [1, 2, 3, 4]}, rows_per_group=3)
    return path


def listed(folder, rows, name="metadata.jsonl"):
    folder.mkdir(exist_ok=True)
    for i in range(6):
        (folder / f"{i}.png").write_bytes(png(i))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def message(path, **options):
    with pytest.raises(DataError) as caught:
        read_pairs(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pick_a_pic_rows_know_who_won(pick):
    pairs, counts = read_pairs(pick)
    assert [pair.prompt for pair in pairs] == ["a", "b", "d"]
    assert [contents(pair.winner) for pair in pairs] == [png(0), png(11), png(3)]
    assert [contents(pair.loser) for pair in pairs] == [png(10), png(1), png(13)]
    assert (counts.rows, counts.used, counts.ties, counts.broken) == (4, 3, 1, 0)
    assert str(counts) == "4 rows: 3 pairs, 1 ties dropped, 0 bad"
    assert pairs[2].id == "pick.parquet:3"


def test_the_written_layout_is_pick_a_pics(pick):
    table = pq.read_table(pick)
    assert table.schema.names == ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "score_0"]
    assert table.schema.field("jpg_0").type == pa.binary() and table.schema.field("label_0").type == pa.float64()
    assert table["label_1"].to_pylist() == [0, 1, 0.5, 0] and table["score_0"].to_pylist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label_0": [0.7]}, "label_0 must be"),
        ({"captions": ["a", "b"]}, "differ in length"),
        ({"extra": {"jpg_0": [1.0]}}, "one of the layout's own"),
    ],
)
def test_a_wrong_table_is_not_written(tmp_path, change, reason):
    arguments = {"captions": ["a"], "pictures_0": [png(0)], "pictures_1": [png(1)], "label_0": [1]} | change
    with pytest.raises(ValueError, match=reason):
        write_pairs_parquet(tmp_path / "x.parquet", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_parquet_reads_one_split(tmp_path):
    for name, prompt in [("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("test-00000-of-00001", "c")]:
        (tmp_path / "data").mkdir(exist_ok=True)
        write_pairs_parquet(tmp_path / "data" / f"{name}.parquet", [prompt], [png(0)], [png(1)], [1])
    assert [pair.prompt for pair in read_pairs(tmp_path)[0]] == ["a", "b"]
    assert [pair.prompt for pair in read_pairs(tmp_path, split="test")[0]] == ["c"]
    assert "no split 'validation', only test, train" in message(tmp_path, split="validation")


def test_chosen_and_rejected_image_columns(tmp_path):
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        name: pa.array([{"bytes": png(i), "path": None}], picture) for i, name in enumerate(["chosen", "rejected"])
    }
    (pair,), _ = read_pairs(write_table(tmp_path / "x.parquet", prompt=["p"], **columns))
    assert (pair.prompt, contents(pair.winner), contents(pair.loser)) == ("p", png(0), png(1))


@pytest.mark.parametrize("form", ["{}", "{}_file_name"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "mine.jsonl"])
def test_lists_of_files(tmp_path, form, name):
    rows = [{"prompt": f"p{i}", form.format("chosen"): f"{i}.png", form.format("rejected"): "5.png"} for i in range(3)]
    folder = listed(tmp_path / "set", rows, name)
    pairs, counts = read_pairs(folder if name == "metadata.jsonl" else folder / name)
    assert [(pair.prompt, contents(pair.winner)) for pair in pairs] == [(f"p{i}", png(i)) for i in range(3)]
    assert all(contents(pair.loser) == png(5) for pair in pairs) and counts.used == 3


def test_a_missing_column_names_those_present_and_the_nearest(tmp_path):
    path = write_table(tmp_path / "x.parquet", caption=["a"], jpg_0=[b""], jpg_1=[b""], lable_0=[1.0], label_1=[0.0])
    said = message(path)
    assert "x.parquet: column 'label_0' is missing" in said and "'caption', 'jpg_0'" in said
    assert "rename it to 'label_0'" in said


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "p", "chosen": "0.png"},
            "'rejected' (or 'rejected_file_name') is missing; it has 'prompt', 'chosen'",
        ),
        ({"prompt": "p", "chosen": "0.png", "rejected": "9.png"}, "'9.png' does not exist"),
        ({"prompt": 3, "chosen": "0.png", "rejected": "1.png"}, "the prompt is int"),
        ({"prompt": "\ud800", "chosen": "0.png", "rejected": "1.png"}, "lone surrogate"),
        ({"prompt": "p", "chosen": "0.png", "rejected": ["1.png"]}, "'rejected' is list, not a file name"),
        ({"prompt": "p", "chosen": "0.png", "rejected": "a\0b"}, "cannot be looked up"),
        ({"prompt": "p", "chosen": "0.png", "rejected": "\ud800"}, "cannot be looked up"),
        ({"prompt": "p", "chosen": "0.png", "rejected": "x" * 5000}, "cannot be looked up"),
        ({"prompt": "p", "chosen": "0.png", "rejected": "file:///etc/passwd"}, "does not exist"),
        ("{not json", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "is a list"),
    ],
)
def test_bad_rows_are_counted_with_their_reason(tmp_path, row, reason):
    good = [{"prompt": f"p{i}", "chosen": "0.png", "rejected": "1.png"} for i in range(99)]
    folder = listed(tmp_path / "set", [*good[:50], row, *good[50:]])
    pairs, counts = read_pairs(folder)
    assert len(pairs) == 99 and counts.broken == 1 and counts.bad_rows[0].row == "metadata.jsonl:51"
    assert reason in counts.bad_rows[0].reason
    said = message(folder, max_bad_fraction=0.005)
    assert "1 of 100 rows are bad" in said and "metadata.jsonl:51" in said and "raise max_bad_fraction" in said


@pytest.mark.parametrize(
    ("labels", "reason"), [((1.0, 1.0), "labels 1.0, 1.0"), ((None, 0.0), "labels None"), ((2.0, -1.0), "2.0")]
)
def test_labels_without_a_winner_are_broken_rows(tmp_path, labels, reason):
    path = write_table(
        tmp_path / "x.parquet",
        caption=["a", "b"],
        jpg_0=[png(0)] * 2,
        jpg_1=[png(1)] * 2,
        label_0=pa.array([1.0, labels[0]], pa.float64()),
        label_1=pa.array([0.0, labels[1]], pa.float64()),
    )
    pairs, counts = read_pairs(path, max_bad_fraction=0.5)
    assert [pair.prompt for pair in pairs] == ["a"] and counts.broken == 1 and reason in counts.bad_rows[0].reason


@pytest.mark.parametrize("hostile", ["../outside.png", "link.png", "linked/outside.png", "/etc/passwd"])
def test_no_path_leaves_the_folder(tmp_path, hostile):
    (tmp_path / "outside.png").write_bytes(png(9))
    folder = listed(tmp_path / "set", [{"prompt": "p", "chosen": "0.png", "rejected": hostile}])
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path)
    said = message(folder, max_bad_fraction=1)
    assert hostile in said and "leads outside" in said and "beside the file" in said


def test_links_that_stay_inside_are_fine(tmp_path):
    folder = listed(tmp_path / "set", [{"prompt": "p", "chosen": "link.png", "rejected": "1.png"}])
    (folder / "link.png").symlink_to(folder / "4.png")
    assert contents(read_pairs(folder)[0][0].winner) == png(4)


def test_loops_of_links_are_a_bad_row(tmp_path):
    folder = listed(tmp_path / "set", [{"prompt": "p", "chosen": "loop.png", "rejected": "1.png"}])
    (folder / "loop.png").symlink_to(folder / "loop.png")
    assert "loop.png" in message(folder)


def test_nothing_to_learn_from(tmp_path):
    write_pairs_parquet(tmp_path / "ties.parquet", ["a"] * 3, [png(0)] * 3, [png(1)] * 3, [0.5] * 3)
    assert "all 3 rows are ties" in message(tmp_path / "ties.parquet")
    write_pairs_parquet(tmp_path / "empty.parquet", [], [], [], [])
    assert "holds no rows" in message(tmp_path / "empty.parquet")
    empty = tmp_path / "folder"
    empty.mkdir()
    assert "found nothing" in message(empty) and "metadata.jsonl" in message(empty)
    (empty / "notes.txt").write_text("x")
    assert "found notes.txt" in message(empty)
    assert "notes.txt: prompts, which say nothing of what people prefer" in message(empty / "notes.txt")
    (empty / "notes.doc").write_text("x")
    assert "a .doc is not a layout known here" in message(empty / "notes.doc")
    assert "no such file" in message(tmp_path / "absent")


def test_two_layouts_in_one_folder_are_not_guessed(tmp_path, pick):
    folder = listed(tmp_path, [{"prompt": "p", "chosen": "0.png", "rejected": "1.png"}])
    assert "holds both metadata.jsonl and pick.parquet" in message(folder)


def test_a_cut_parquet_file_is_named(pick):
    data = pick.read_bytes()
    for length in range(0, len(data), len(data) // 40):
        pick.write_bytes(data[:length])
        assert "pick.parquet: cannot be read as parquet" in message(pick)


def test_a_parquet_file_with_a_flipped_bit_is_read_or_named(tmp_path):
    """At 200 places, most of them in the file's end, where one bit can change lengths, places and types."""
    path = tmp_path / "pick.parquet"
    shades = range(100)
    write_pairs_parquet(path, ["p"] * 100, [*map(png, shades)], [*map(png, shades)], [1] * 100, rows_per_group=32)
    data = path.read_bytes()
    draw = random.Random(0)
    named = 0
    for flip in range(200):
        damaged = bytearray(data)
        damaged[draw.randrange(0 if flip % 4 == 0 else len(data) - 3000, len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            for pair in read_pairs(path, max_bad_fraction=1)[0]:
                contents(pair.winner)
        except DataError as error:
            named += 1
            assert "pick.parquet" in str(error) and "\n" not in str(error)
    assert named > 20


def test_a_cell_of_a_rewritten_file_is_read_again(pick):
    pairs, _ = read_pairs(pick)
    assert contents(pairs[0].winner) == png(0)
    write_pairs_parquet(pick, list("abcd"), [png(40)] * 4, [png(50)] * 4, [1] * 4)
    os.utime(pick, ns=(1, 1))
    assert contents(pairs[0].winner) == png(40)
    with pytest.raises(DataError, match="no row 7"):
        ParquetCell(pick, 7, "jpg_0").read()


def test_the_fingerprint_follows_content_not_place(tmp_path, pick):
    pairs, _ = read_pairs(pick)
    moved = tmp_path / "elsewhere.parquet"
    moved.write_bytes(pick.read_bytes())
    assert fingerprint(read_pairs(moved)[0]) == fingerprint(pairs)
    first = pairs[0]
    swapped = Pair(first.id, first.prompt, first.loser, first.winner)
    renamed = Pair("other", first.prompt, first.winner, first.loser)
    reworded = Pair(first.id, "x", first.winner, first.loser)
    names = [fingerprint([pair, *pairs[1:]]) for pair in (first, renamed, swapped, reworded)]
    assert names[0] == names[1] and len(set(names)) == 3
    assert fingerprint(pairs[::-1]) != names[0] and fingerprint(pairs[:2]) != names[0]
    write_pairs_parquet(moved, list("abcd"), [png(i + 1) for i in range(4)], [png(10)] * 4, [1, 0, 0.5, 1])
    assert fingerprint(read_pairs(moved)[0]) != names[0]
    folder = listed(tmp_path / "set", [{"prompt": "p", "chosen": "0.png", "rejected": "1.png"}])
    before = fingerprint(read_pairs(folder)[0])
    (folder / "1.png").write_bytes(png(77))
    assert fingerprint(read_pairs(folder)[0]) != before
