"""One reader of prompts for all verbs: every form, what it says of a prompt, and lines that say what is wrong."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_align.data.bad_rows import DataError
from diffusion_align.data.prompts import Prompt, prompt_of, read_list


def texts(path):
    return [prompt.text for prompt in read_list(path)]


@pytest.mark.parametrize(
    ("name", "text", "second"),
    [
        ("a.txt", "\ufeffone\n\n two \n", Prompt("two")),
        ("a.json", '["one", {"caption": "two", "tag": "x"}]', Prompt("two", ("tag: x",), {"tag": "x"})),
        ("a.jsonl", '{"Text": "one"}\n\n{"Prompt": "two", "n": 3}\n', Prompt("two", (), {"n": 3})),
        (
            "a.ndjson",
            '{"prompt": "one"}\n{"prompt": " "}\n{"prompt": "two", "skills": ["x", "y"]}',
            Prompt("two", ("skills: x", "skills: y"), {"skills": ["x", "y"]}),
        ),
        (
            "a.csv",
            'Prompts,Category\none,x\n" two ","y, z"\n',
            Prompt("two", ("category: y, z",), {"Category": "y, z"}),
        ),
        ("a.tsv", 'Prompt\tNote\none\t"\ntwo\ta "b\n', Prompt("two", (), {"Note": 'a "b'})),
    ],
)
def test_every_form_of_a_list(tmp_path, name, text, second):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = read_list(tmp_path / name)
    assert [prompt.text for prompt in found] == ["one", "two"] == texts(tmp_path / name)
    assert found[1] == second


def test_parquet_gives_its_text_and_leaves_lists_alone(tmp_path):
    """The forms of DPG-Bench's and T2I-CompBench's copies."""
    questions = [[{"question": "is there a cat?", "proposition_id": 1}], []]
    table = {"item_id": ["7", "COCOval2014000000000042"], "prompt": ["a cat", "a dog"], "questions": questions}
    pq.write_table(pa.table(table), tmp_path / "dpg.parquet")
    assert read_list(tmp_path / "dpg.parquet") == [
        Prompt("a cat", (), {"item_id": "7"}),
        Prompt("a dog", (), {"item_id": "COCOval2014000000000042"}),
    ]
    pq.write_table(pa.table({"text": pa.array(["a cat", "a dog"], pa.large_string())}), tmp_path / "t2i.parquet")
    assert texts(tmp_path / "t2i.parquet") == ["a cat", "a dog"]


def test_a_folder_of_files_is_a_prompt_each_named_by_its_file(tmp_path):
    for name, text in (("10", "ten\nand more\n"), ("9", "nine"), ("stanford_7", "seven")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "README.md").write_text("no prompt")
    assert read_list(tmp_path) == [
        Prompt("ten\nand more", (), {"item_id": "10"}),
        Prompt("nine", (), {"item_id": "9"}),
        Prompt("seven", (), {"item_id": "stanford_7"}),
    ]


def write_parquet(path, columns):
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"one\n\xff\xfe\n", "a.txt:2 is not text in UTF-8"),
        ("a.tsv", b"Prompt\n\xff\n", "is not text in UTF-8"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'["one", 5]', "a.json:1 is a int, not an object with names"),
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt": 3}\n', "a.jsonl:2 the prompt is int, not text"),
        ("a.jsonl", b'{"prompt": "one"}\n{"words": "x"}\n', "a.jsonl:2 has no prompt, caption, text"),
        ("a.jsonl", b'{"prompt": "one"}\n{"prom', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "a.jsonl:1 the prompt holds a lone surrogate"),
        ("a.csv", b"prompt\none\n\xff\n", "a.csv:3 is not text in UTF-8"),
        ("a.parquet", {"prompt": [1, 2]}, "has no prompt"),
        (
            "a.parquet",
            {"caption": ["a"], "jpg_0": [b"x"], "jpg_1": [b"x"], "label_0": [1.0], "label_1": [0.0]},
            "not prompts; give a .txt",
        ),
        ("a.jsonl", b'{"prompt": "one", "chosen": "a.png"}\n', "column 'rejected'"),
        ("a.parquet", b"PAR1 but no more", "cannot be read as parquet"),
        ("a.pdf", b"%PDF", "is not a list of prompts known here"),
    ],
)
def test_files_that_are_no_lists_are_refused_in_one_line(tmp_path, name, content, said):
    if isinstance(content, dict):
        write_parquet(tmp_path / name, content)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        read_list(tmp_path / name)
    assert said in str(refused.value) and "\n" not in str(refused.value) and name in str(refused.value)


def test_missing_paths_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file or folder; give a .txt"):
        read_list(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="holds no .txt"):
        read_list(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="a.txt is not text in UTF-8"):
        read_list(tmp_path)


def test_other_columns_can_be_written_as_json():
    """It goes into metadata.jsonl: cells that cannot be read, and a CSV row's rest, do not."""
    broken = UnicodeDecodeError("utf-8", b"", 0, 1, "")
    row: dict[Any, Any] = {"prompt": "a", None: ["too", "long"], "n": 1, "broken": broken}
    prompt = prompt_of(row)
    assert isinstance(prompt, Prompt) and json.loads(json.dumps(prompt.extra)) == {"n": 1}


LINES = "a cat\nein Hündchen\n"


@pytest.mark.parametrize("ending", ["", ".txt", ".TXT", ".text", ".list", ".prompts"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)  # the two with an order have no mark
def test_lines_in_every_encoding_and_under_every_ending(tmp_path, encoding, ending):
    (tmp_path / f"prompts{ending}").write_bytes(LINES.replace("\n", "\r\n").encode(encoding))
    assert texts(tmp_path / f"prompts{ending}") == ["a cat", "ein Hündchen"]


@pytest.mark.parametrize(
    "content",
    [
        {"prompts": ["a cat", "a dog"]},
        {"version": 1, "data": [{"caption": "a cat"}, {"caption": "a dog"}]},
        {"Prompt": ["a cat", "a dog"]},
        {"0": "a cat", "1": "a dog"},
        {"x": {"prompt": "a cat"}, "y": {"prompt": "a dog"}},
        ["a cat", "a dog"],
    ],
)
@pytest.mark.parametrize("name", ["p.json", "p", "p.JSON"])
def test_the_usual_objects_that_hold_a_list(tmp_path, content, name):
    (tmp_path / name).write_text(json.dumps(content, indent=1))
    assert texts(tmp_path / name) == ["a cat", "a dog"]


def test_ids_of_an_object_are_kept_and_one_object_is_one_prompt(tmp_path):
    (tmp_path / "p.json").write_text('{"7": "a cat", "9": "a dog"}')
    assert [prompt.extra for prompt in read_list(tmp_path / "p.json")] == [{"item_id": "7"}, {"item_id": "9"}]
    for name in ("one.json", "one.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a cat", "tag": "x"}')
        assert read_list(tmp_path / name) == [Prompt("a cat", ("tag: x",), {"tag": "x"})]


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p"])
def test_lines_of_objects_under_any_ending(tmp_path, name):
    (tmp_path / name).write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    assert texts(tmp_path / name) == ["a cat", "a dog"]


def test_tables_in_utf_16_too(tmp_path):
    (tmp_path / "p.csv").write_text("Prompt,Category\na cat,x\n", encoding="utf-16")
    (tmp_path / "parti").write_text("Prompt\tCategory\na cat\tx\n")
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\na cat\tx\n", encoding="utf-16")
    for name in ("p.csv", "parti", "p.tsv"):
        assert read_list(tmp_path / name) == [Prompt("a cat", ("category: x",), {"Category": "x"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"a cat\nit\x92s a dog\n", "p.txt:2 is not text in UTF-8 (byte 0x92), likely in Windows-1252"),
        ("p", b"it\x92s", "`iconv -f WINDOWS-1252 -t UTF-8 p > utf8.txt`"),
        ("p.csv", b"prompt\nit\x92s\n", "p.csv:2 is not text in UTF-8 (byte 0x92)"),
        ("p.txt", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00", "p.txt: is not text"),
        ("p.json", b'{"settings": {"a": 1}}', "p.json: is an object with 'settings', not a list of prompts"),
        ("p.json", b'{"prompts": [5]}', "p.json: holds no rows"),
        ("p.yaml", b"- a cat", "is not a list of prompts known here"),
        ("p", "\n".encode("utf-16"), "holds no prompt"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_encoding_or_the_form(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_list(tmp_path / name)
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path / name))
