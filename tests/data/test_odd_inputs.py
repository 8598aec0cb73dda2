"""Files as people have them: each is read to the pairs it means, or refused with a cure that works. Most come from what
users of trainers and loaders have reported."""

# ruff: noqa: E501  (tables of inputs)
import bz2
import gzip
import json
import lzma
import unicodedata
import zipfile

import pyarrow as pa
import pytest
from helpers_data import STRUCT, dump, lines, pictures, png, structs, table, tar

from diffusion_align.data import read_pairs
from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.images import decode_image
from diffusion_align.data.pairs_and_rankings import fingerprint
from diffusion_align.data.read import read_rows
from diffusion_align.data.rows.listing import HIDDEN
from diffusion_align.data.rows.raw_rows import read_bytes
from diffusion_align.data.rows.recognise import recognise
from diffusion_align.data.rows.tables.text import PLAIN, ReadOptions

ROWS = [("a cat", 1, 2), ("a dog", 3, 4)]


def shade(picture):
    """The red of a picture's first pixel."""
    return decode_image(read_bytes(picture)).getpixel((0, 0))[0]


def pairs_of(path, options=PLAIN, **more):
    """(prompt, shade of the winner, shade of the loser) of every pair, all rows good."""
    pairs, counts = read_pairs(path, options=options, **more)
    assert counts.broken == 0, counts.bad_rows
    fingerprint(pairs)  # every kind of picture counts in the key of a cache
    return [(pair.prompt, shade(pair.winner), shade(pair.loser)) for pair in pairs]


def csv_text(separator=",", names=("prompt", "chosen", "rejected"), ending="\n", rows=ROWS):
    text = [separator.join(names)] + [separator.join((p, f"{a}.png", f"{b}.png")) for p, a, b in rows]
    return ending.join(text) + ending


def json_lines(names=("prompt", "chosen", "rejected"), rows=ROWS):
    values = [dict(zip(names, (p, f"{a}.png", f"{b}.png"), strict=True)) for p, a, b in rows]
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def put(root, name, content):
    """A file of pairs beside its four pictures."""
    pictures(root, "1.png", "2.png", "3.png", "4.png")
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstd(data):
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(data)
    return stream.getvalue().to_pybytes()


LIST = json.dumps([json.loads(line) for line in json_lines().splitlines()])
PANDAS = {"prompt": {"0": "a cat", "1": "a dog"}, "chosen": {"0": "1.png", "1": "3.png"},
          "rejected": {"0": "2.png", "1": "4.png"}}  # fmt: skip
# name: content of a file that holds ROWS
TABLES = {
    "semicolon.csv": csv_text(";"), "tab.csv": csv_text("\t"), "bar.csv": csv_text("|"), "tab.tsv": csv_text("\t"),
    "excel.csv": "sep=;\n" + csv_text(";"), "spaces.csv": csv_text(", "), "capital.CSV": csv_text(),
    "windows.csv": csv_text(ending="\r\n"), "old_mac.csv": csv_text(ending="\r"), "mark.csv": b"\xef\xbb\xbf" + csv_text().encode(),
    "utf16.csv": csv_text().encode("utf-16"), "utf16be.csv": csv_text().encode("utf-16-be"), "utf32.csv": csv_text().encode("utf-32"),
    "blank_lines.csv": csv_text(ending="\n\n"), "quoted.csv": csv_text().replace("a cat", '"a cat"'),
    "lines.json": json_lines(), "list.jsonl": LIST, "capital.JSONL": json_lines(), "mark.jsonl": b"\xef\xbb\xbf" + json_lines().encode(),
    "utf16.jsonl": json_lines().encode("utf-16"), "utf16.json": LIST.encode("utf-16-le"), "windows.jsonl": json_lines().replace("\n", "\r\n"),
    "old_mac.jsonl": json_lines().replace("\n", "\r"), "blank.jsonl": "\n\n" + json_lines(), "no_end.jsonl": json_lines().rstrip(),
    "data.json": json.dumps({"version": 1, "data": json.loads(LIST)}), "rows.json": json.dumps({"rows": json.loads(LIST)}, indent=1),
    "pandas.json": json.dumps(PANDAS), "pandas_indent.json": json.dumps(PANDAS, indent=2), "indented.json": json.dumps(json.loads(LIST), indent=4),
    "packed.jsonl.gz": gzip.compress(json_lines().encode()), "packed.csv.gz": gzip.compress(csv_text(";").encode()),
    "packed.json.xz": lzma.compress(LIST.encode()), "packed.jsonl.bz2": bz2.compress(json_lines().encode()),
    "packed.jsonl.zst": zstd(json_lines().encode()), "two.v2.jsonl.GZ": gzip.compress(json_lines().encode("utf-16")),
    "winner.csv": csv_text(names=("prompt", "winner", "loser")), "capitals.csv": csv_text(names=("Prompt", "Chosen", "Rejected")),
    "image_first.jsonl": json_lines(("caption", "image_chosen", "image_rejected")), "image_last.jsonl": json_lines(("text", "chosen_image", "rejected_image")),
    "win.csv": csv_text(names=("PROMPT", "Image W", "Image L")), "preferred.csv": csv_text(names=("prompt", "preferred", "dispreferred")),
    "paths.csv": csv_text(names=("original_prompt", "better_path", "worse_path")), "good.csv": csv_text(";", names=(" prompt ", "good", "bad")),
    "file-names.csv": csv_text(names=("prompt", "chosen-file-name", "rejected-file-name")),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_any_form_is_read_alone_and_in_its_folder(tmp_path, name):
    path = put(tmp_path, name, TABLES[name])
    assert pairs_of(path) == ROWS
    assert pairs_of(tmp_path) == ROWS


@pytest.mark.parametrize("name", ["images\\1.png", ".\\images\\1.png", "images/1.PNG", "IMAGES/1.png", " images/1.png", "./images//1.png"])  # fmt: skip
def test_a_name_that_differs_by_slashes_case_or_spaces_means_the_one_file_there_is(tmp_path, name):
    pictures(tmp_path, "images/1.png", "images/2.png")
    path = lines(tmp_path / "x.jsonl", [{"prompt": "a", "chosen": name, "rejected": "images/2.png"}])
    assert pairs_of(path) == [("a", 1, 2)]


@pytest.mark.parametrize("word", ["café", "Ångström", "ガラス", "한국어", "naïve ﬁ"])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_in_another_unicode_form_is_found(tmp_path, word, forms):
    listed, stored = (unicodedata.normalize(form, word) for form in forms)
    pictures(tmp_path, "1.png", "2.png")
    (tmp_path / "1.png").rename(tmp_path / f"{stored}.png")
    path = lines(tmp_path / "x.jsonl", [{"prompt": "a", "chosen": f"{listed}.png", "rejected": "2.png"}])
    assert pairs_of(path) == [("a", 1, 2)]


def test_a_name_that_may_mean_two_files_is_refused_until_it_is_exact(tmp_path):
    pictures(tmp_path, "1.png", "2.png")
    (tmp_path / "A.png").write_bytes(png(1))
    (tmp_path / "a.PNG").write_bytes(png(9))
    row = {"prompt": "a", "chosen": "a.png", "rejected": "2.png"}
    with pytest.raises(DataError, match=r"'A.png', 'a.PNG' do: give one name exactly"):
        read_pairs(lines(tmp_path / "x.jsonl", [row]))
    assert pairs_of(lines(tmp_path / "x.jsonl", [{**row, "chosen": "A.png"}])) == [("a", 1, 2)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("C:\\Users\\me\\1.png", "path of another machine"), ("D:/x/1.png", "path of another machine"),
        ("https://x.org/1.png", "it is an address, so download"), ("s3://b/1.png", "it is an address, so download"),
        ("data:image/png;base64,iVBO", "save it as a file"), ("1.jpg", "does not exist"), ("1", "does not exist"),
        ([{"role": "user", "content": "hi"}], "is list, not a file name"), (None, "is NoneType, not a file name"),
        (7, "is int, not a file name"), ("", "is str, not a file name"),
    ],
)  # fmt: skip
def test_a_name_that_means_no_file_here_is_one_row_with_its_reason(tmp_path, name, reason):
    pictures(tmp_path, "1.png", "2.png")
    path = lines(tmp_path / "x.jsonl", [{"prompt": "a", "chosen": name, "rejected": "2.png"}])
    (bad,) = [row for row in read_rows(recognise(path)) if isinstance(row, BadRow)]
    assert reason in bad.reason
    assert pairs_of(lines(path, [{"prompt": "a", "chosen": "1.png", "rejected": "2.png"}])) == [("a", 1, 2)]  # the cure


@pytest.mark.parametrize("up", ["..\\1.png", "..\\..\\1.png", "x\\..\\..\\1.png"])
def test_backslashes_lead_no_further_than_slashes(tmp_path, up):
    pictures(tmp_path, "1.png", "in/2.png")
    with pytest.raises(DataError, match="leads outside"):
        read_pairs(lines(tmp_path / "in" / "x.jsonl", [{"prompt": "a", "chosen": up, "rejected": "2.png"}]))


SIDE = ["._1.png", "._x.parquet", ".DS_Store", "Thumbs.db", "desktop.ini", "ehthumbs.db", ".ipynb_checkpoints/x-checkpoint.png",
        ".cache/x.parquet", ".git/x.parquet", "__MACOSX/._1.png", "__MACOSX/x.parquet", "@eaDir/1.png", ".Trashes/1.png",
        ".hidden.csv", "$RECYCLE.BIN/x.jsonl", ".~lock.pairs.csv#"]  # fmt: skip


@pytest.mark.parametrize("name", SIDE)
@pytest.mark.parametrize("kind", ["parquet", "list", "captions"])
def test_what_systems_leave_is_left_out_and_counted(tmp_path, name, kind):
    if kind == "parquet":
        table(tmp_path / "train.parquet", prompt=["a"], chosen=structs([1]), rejected=structs([2]))
    elif kind == "list":
        put(tmp_path, "pairs.csv", csv_text())
    else:
        pictures(tmp_path, "1.png")
        (tmp_path / "1.txt").write_text("a")
    before = list(read_rows(recognise(tmp_path)))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet" and path.name != "._x.parquet":
        table(path, prompt=["a"], chosen=structs([1]), rejected=structs([2]))
    else:
        path.write_bytes(b"\x00\x05\x16\x07")
    (path.parent / "x-checkpoint.txt").write_text("a") if "checkpoint" in name else None
    source = recognise(tmp_path)
    assert list(read_rows(source)) == before and source.unread[HIDDEN] == 1


def test_a_hidden_folder_that_is_named_is_read_and_one_with_nothing_else_says_so(tmp_path):
    put(tmp_path / ".data", "pairs.csv", csv_text())
    assert pairs_of(tmp_path / ".data") == ROWS
    with pytest.raises(DataError, match="found nothing and 1 hidden, which are left out"):
        recognise(tmp_path)


def captions(path):
    """{prompt: shade} of an archive or folder of captions."""
    rows = list(read_rows(recognise(path)))
    assert not [row for row in rows if isinstance(row, BadRow)], rows
    return {row.prompt: shade(row.pictures[0]) for row in rows}


def pack(path, members):
    if path.suffix == ".tar":
        return tar(path, members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def named(*pairs):
    return [member for name, n in pairs for member in ((f"{name}.png", png(n)), (f"{name}.txt", f"p{n}".encode()))]


ARCHIVES = {
    "dots": named(("22.05", 1), ("22.06", 2), ("23.01", 3)),
    "a version and a title": named(("./235 Track 2.0 (Clean)", 1), ("./235 Track 2.1 (Clean)", 2), ("x", 3)),
    "folders with dots": named(("a/22.0/1.1", 1), ("a/22.0/1.2", 2), ("a/22.0/2", 3)),
    "pictures first": sorted(named(("1", 1), ("2", 2), ("3", 3)), key=lambda m: m[0][-3:]),
    "texts first and dots": sorted(named(("1.a", 1), ("1.b", 2), ("3", 3)), key=lambda m: m[0][-3:], reverse=True),
    "shuffled": [named(("1", 1), ("2", 2), ("3", 3))[i] for i in (3, 0, 5, 1, 4, 2)],
    "capitals": [(n.upper(), d) for n, d in named(("1", 1), ("2", 2), ("3", 3))],
    "Mac side files": [m for n, d in named(("1", 1), ("2", 2), ("3", 3)) for m in ((f"._{n}", b"\x00"), (n, d), (f"__MACOSX/._{n}", b"\x00"))],
    "folder entries": [("d/.DS_Store", b"\x00"), *named(("d/1", 1), ("d/2", 2), ("d/3", 3))],
    "kohya's suffix": [(n.replace(".txt", ".caption"), d) for n, d in named(("1", 1), ("2", 2), ("3", 3))],
    "a mark": [(n, b"\xef\xbb\xbf" + d if n.endswith("txt") else d) for n, d in named(("1", 1), ("2", 2), ("3", 3))],
    "UTF-16": [(n, d.decode().encode("utf-16") if n.endswith("txt") else d) for n, d in named(("1", 1), ("2", 2), ("3", 3))],
    "second suffixes": [(n.replace(".png", ".image.png").replace(".txt", ".text.txt"), d) for n, d in named(("1", 1), ("2", 2), ("3", 3))],
}  # fmt: skip


@pytest.mark.parametrize("kind", [".tar", ".zip"])
@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_in_any_order_and_under_any_names_gives_its_samples(tmp_path, case, kind):
    path = pack(tmp_path / f"x{kind}", ARCHIVES[case])
    assert captions(path) == {"p1": 1, "p2": 2, "p3": 3}
    assert captions(tmp_path) == {"p1": 1, "p2": 2, "p3": 3}


@pytest.mark.parametrize("kind", [".tar", ".zip"])
@pytest.mark.parametrize("key", ["0", "0.5", "v1.2/a.b"])
def test_pick_a_pic_archives_with_dots_and_apart(tmp_path, kind, key):
    members = []
    for n, prompt in ((1, "a cat"), (3, "a dog")):
        parts = {"jpg_0.jpg": png(n), "jpg_1.jpg": png(n + 1), "label_0.txt": b"1", "label_1.txt": b"0", "original_prompt.txt": prompt.encode()}  # fmt: skip
        members += [(f"{key}{n}.{name}", data) for name, data in parts.items()]
    for order in (members, sorted(members, key=lambda member: member[0].split(".")[-2])):
        assert sorted(pairs_of(pack(tmp_path / f"x{kind}", order))) == ROWS


def test_samples_that_lack_something_and_members_twice_are_named(tmp_path):
    members = [
        *named(("1", 1)),
        ("2.png", png(2)),
        ("3.txt", b"c"),
        ("4.png", png(4)),
        ("4.png", png(4)),
        ("4.txt", b"d"),
    ]
    rows = list(read_rows(recognise(pack(tmp_path / "x.tar", members))))
    assert [row.prompt for row in rows if not isinstance(row, BadRow)] == ["p1"]
    assert [str(row) for row in rows if isinstance(row, BadRow)] == [
        "x.tar:2 has no text beside its picture",
        "x.tar:3 has 0 pictures, not one (.txt)",
        "x.tar:4 has two members .png",
    ]


IN_ZIP = {
    "metadata.jsonl": json_lines(("prompt", "chosen_file_name", "rejected_file_name")),
    "set/pairs.csv": csv_text(";"),
    "deep/er/x.JSON": LIST,
    "a b/tab.tsv": csv_text("\t"),
}


@pytest.mark.parametrize("name", IN_ZIP)
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_a_zip_of_a_list_and_its_pictures(tmp_path, name, slash):
    folder = name.rpartition("/")[0]
    inside = [(f"{folder}/{n}.png".lstrip("/"), png(n)) for n in (1, 2, 3, 4)]
    members = [(name, IN_ZIP[name].encode()), *inside, ("__MACOSX/._1.png", b"\x00")]
    path = pack(tmp_path / "x.zip", [(member.replace("/", slash), data) for member, data in members])
    assert pairs_of(path) == ROWS


def test_zips_that_cannot_be_read_are_refused(tmp_path):
    path = pack(tmp_path / "x.zip", [("pairs.csv", csv_text().replace("1.png", "../1.png").encode()), *named(("2", 2))])
    with pytest.raises(DataError, match="leads outside"):
        read_pairs(path)
    (tmp_path / "cut.zip").write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cut.zip: is not a zip archive, or damaged"):
        recognise(tmp_path / "cut.zip")
    data = bytearray(pack(tmp_path / "locked.zip", named(("1", 1))).read_bytes())
    for mark, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        data[data.index(mark) + place] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(DataError, match="is encrypted; unzip it with its password"):
        recognise(tmp_path / "locked.zip")
    sides = [(f"{side}/{n}.png", png(n)) for n, side in ((1, "chosen"), (2, "rejected"))]
    with pytest.raises(DataError, match="unpack it, and give the folder"):
        recognise(pack(tmp_path / "sides.zip", [*sides, ("chosen/1.txt", b"a"), ("rejected/1.txt", b"a")]))


def two_sides(root, better="chosen", worse="rejected", names=("07", "08"), suffixes=(".png", ".png")):
    for k, name in enumerate(names):
        for place, folder in enumerate((better, worse)):
            path = root / folder / f"{name}{suffixes[place]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(2 * k + 1 + place))
    return root


PROMPTS = {
    "prompts.csv": "file_name,prompt\n07.png,a cat\n08.png,a dog\n", "prompts.tsv": "file_name\tprompt\n08\ta dog\n07\ta cat\n",
    "prompts.txt": "a cat\na dog\n", "prompts.TXT": "a cat\r\na dog", "captions.jsonl": '{"file_name": "chosen/07.png", "text": "a cat"}\n{"file_name": "chosen/08.png", "text": "a dog"}\n',
    "metadata.csv": "file_name;text\n07.png;a cat\n08.png;a dog\n", "metadata.jsonl": '{"file_name": "chosen\\\\07.png", "prompt": "a cat"}\n{"file_name": "chosen\\\\08.png", "prompt": "a dog"}\n',
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_pairs_in_two_folders_with_a_list_of_prompts(tmp_path, name):
    (two_sides(tmp_path) / name).write_text(PROMPTS[name], newline="")
    (tmp_path / "chosen" / ".DS_Store").write_bytes(b"\x00")
    assert pairs_of(tmp_path) == ROWS


@pytest.mark.parametrize("place", ["chosen", "rejected", "prompts", "captions"])
@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".caption"])
def test_pairs_in_two_folders_with_texts(tmp_path, place, suffix):
    two_sides(tmp_path, suffixes=(".png", ".PNG"))
    (tmp_path / place).mkdir(exist_ok=True)
    for name, prompt in (("07", "a cat"), ("08", "a dog")):
        (tmp_path / place / f"{name}{suffix}").write_text(prompt)
    assert pairs_of(tmp_path) == ROWS


@pytest.mark.parametrize(
    "sides", [("winner", "loser"), ("Chosen", "Rejected"), ("good", "bad"), ("preferred", "dispreferred")]
)
def test_pairs_in_two_folders_of_other_names(tmp_path, sides):
    (two_sides(tmp_path, *sides, names=("a.1", "a.2")) / "prompts.txt").write_text("a cat\na dog\n")
    assert pairs_of(tmp_path) == ROWS


def test_pairs_in_two_folders_that_cannot_be_told_are_refused_with_a_cure(tmp_path):
    root = two_sides(tmp_path, names=("1", "2", "10"))
    with pytest.raises(
        DataError, match=r"no prompts: put 07.txt beside 07.png, or prompts.csv with file_name and prompt"
    ):
        recognise(root) and list(read_rows(recognise(root)))
    (root / "prompts.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"has 2 lines for 3 names of pictures"):
        read_pairs(root)
    (root / "prompts.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"two orders, 1 2 10 and 1 10 2.*give prompts.csv with file_name and prompt"):
        read_pairs(root)
    (root / "prompts.txt").unlink()
    (root / "prompts.csv").write_text("file_name,prompt\n1.png,a\n2.png,b\n10.png,c\n")
    assert pairs_of(root) == [("a", 1, 2), ("c", 5, 6), ("b", 3, 4)]
    (root / "rejected" / "2.png").unlink()
    (bad,) = read_pairs(root, max_bad_fraction=1)[1].bad_rows
    assert bad.reason == "has no picture of this name in rejected"


FOREIGN = {
    "cp1252": "it’s a café",
    "cp1251": "кошка",
    "gb18030": "白色的猫",
    "shift_jis": "猫です",
    "euc_kr": "고양이",
    "utf-16-le": "é ж 猫",
}


@pytest.mark.parametrize("encoding", FOREIGN)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "caption", "tar"])
def test_a_text_in_another_encoding_is_read_once_it_is_named(tmp_path, encoding, kind):
    prompt = FOREIGN[encoding]
    if kind in ("caption", "tar"):
        text = prompt.encode(encoding)
        path = tmp_path
        if kind == "tar":
            path = tar(tmp_path / "x.tar", [("1.png", png(1)), ("1.txt", text)])
        else:
            pictures(tmp_path, "1.png")
            (tmp_path / "1.txt").write_bytes(text)
    else:
        rows = [(prompt, 1, 2)]
        text = {"csv": csv_text(rows=rows), "jsonl": json_lines(rows=rows)}.get(kind)
        text = text or json.dumps([json.loads(json_lines(rows=rows))], ensure_ascii=False)
        path = put(tmp_path, f"x.{kind}", text.encode(encoding))
    options = ReadOptions(encoding)
    (row,) = read_rows(recognise(path, options=options))
    assert not isinstance(row, BadRow) and row.prompt == prompt
    if encoding != "utf-16-le":  # whose zeros tell it
        with pytest.raises(
            DataError, match=r"is not text in UTF-8 \(byte 0x..\)(, likely in Windows-1252|: give its encoding)"
        ):
            bad = [row for row in read_rows(recognise(path)) if isinstance(row, BadRow)]
            raise DataError(bad[0].reason)


CHATS = {
    "a text": ([{"role": "user", "content": "a cat"}], None),
    "a system message": ([{"role": "system", "content": "draw"}, {"role": "user", "content": "a cat"}], None),
    "parts": ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a cat"}]}], None),
    "two turns": ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "is a chat of 2 messages"),
    "two texts": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        "of 2 texts",
    ),
    "no text": ([{"role": "user", "content": None}], "the prompt is NoneType"),
    "a list": (["a cat"], "the prompt is list"),
    "nothing": ([], "the prompt is list"),
}


@pytest.mark.parametrize("case", CHATS)
def test_a_chat_is_a_prompt_if_it_holds_one_text(tmp_path, case):
    chat, reason = CHATS[case]
    pictures(tmp_path, "1.png", "2.png")
    path = lines(tmp_path / "x.jsonl", [{"prompt": chat, "chosen": "1.png", "rejected": "2.png"}])
    if reason is None:
        assert pairs_of(path) == [("a cat", 1, 2)]
        if isinstance(chat[0]["content"], str):
            columns = {"prompt": pa.array([chat]), "chosen": structs([1]), "rejected": structs([2])}
            assert pairs_of(table(tmp_path / "t" / "x.parquet", **columns)) == [("a cat", 1, 2)]
        return
    with pytest.raises(DataError, match=reason):
        read_pairs(path)


def test_columns_by_any_names_are_mapped(tmp_path):
    path = put(tmp_path, "x.csv", csv_text(names=("what", "left side", "ours")))
    with pytest.raises(DataError, match=r"column .* is missing"):
        read_pairs(path)
    options = ReadOptions("", {"prompt": "what", "chosen": "left side", "rejected": "ours"})
    assert pairs_of(path, options) == ROWS
    swapped = ReadOptions("", {"prompt": "what", "rejected": "left side", "chosen": "ours"})
    assert pairs_of(path, swapped) == [(prompt, b, a) for prompt, a, b in ROWS]
    with pytest.raises(DataError, match="has no column 'nope' to read as chosen; it has 'what', 'left side', 'ours'"):
        read_pairs(path, options=ReadOptions("", {"chosen": "nope"}))


def test_a_mapping_comes_before_names_that_fit_by_themselves(tmp_path):
    """`chosen` holds the text of a chat, and the pictures lie in columns of other names."""
    columns = {"prompt": ["a"], "chosen": ["a text"], "rejected": ["b"], "good": structs([1]), "bad": structs([2])}
    path = table(tmp_path / "x.parquet", **columns)
    assert pairs_of(path, ReadOptions("", {"chosen": "good", "rejected": "bad"})) == [("a", 1, 2)]


@pytest.mark.parametrize(
    "names", [("image_0", "image_1"), ("img0", "img1"), ("Image_0", "Image_1"), ("picture_0", "picture_1")]
)
def test_numbered_pictures_with_labels(tmp_path, names):
    columns = {"caption": ["a cat", "a dog"], names[0]: structs([1, 4]), names[1]: structs([2, 3])}
    path = table(tmp_path / "x.parquet", **columns, label_0=[1.0, 0.0], label_1=[0.0, 1.0])
    assert pairs_of(path) == ROWS
    with pytest.raises(DataError, match="is missing"):  # who won is not said
        read_pairs(table(tmp_path / "y.parquet", **columns))


def test_names_that_mean_two_things_are_refused_until_they_are_mapped(tmp_path):
    text = "prompt,winner,loser,good,bad\na,1.png,2.png,3.png,4.png\n"
    path = put(tmp_path, "x.csv", text)
    with pytest.raises(
        DataError, match=r"could both be chosen and rejected: say which with chosen=... and rejected=..."
    ):
        read_pairs(path)
    assert pairs_of(path, ReadOptions("", {"chosen": "good", "rejected": "bad"})) == [("a", 3, 4)]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.bz2", "x.jsonl.xz", "x.jsonl.zst"])
def test_a_compressed_list_that_is_cut_or_no_such_file_is_one_line(tmp_path, name):
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
    data = packers[name[name.rindex(".") :]](json_lines(rows=ROWS * 200).encode())
    for broken in (data[:-20], b"no archive", data[: len(data) // 2]):
        with pytest.raises(DataError, match=rf"{name}: is damaged or cut off .*fetch the file again"):
            read_pairs(put(tmp_path, name, broken))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.csv", "prompt,chosen,chosen\na,1.png,2.png\n", "has two columns 'chosen'; rename or remove one"),
        ("x.csv", "prompt,chosen,rejected\na cat, on a mat,1.png,2.png\n", "has 4 cells for 3 columns: put texts with separators into quotation marks"),
        ("x.csv", "", "holds no rows"), ("x.csv", "prompt,chosen,rejected\n", "holds no rows"),
        ("x.jsonl", "", "holds no rows"), ("x.json", "", "not a JSON list"), ("x.json", "null", "not a JSON list"),
        ("x.json", '{"prompt": "a"', "neither a JSON list nor an object a line"), ("x.json", "[", "is no JSON, or does not end"),
        ("x.json", LIST + LIST, "goes on after its list"), ("x.jsonl", '["a"]\n["b"]\n', "goes on after its list"),
        ("x.json", '{"a": {"b": 1}}\n', "is missing"), ("x.xlsx", b"PK", "save it as CSV"), ("x.pkl", b"\x80", "save it as parquet"),
        ("x.parquet.gz", b"\x1f", "unpack it first"), ("x.tar.gz", b"\x1f", "unpack it first"), ("x.rar", b"R", "unpack it first"),
        ("1.png", png(1), "give the folder that holds it"), ("x", "a", "file without suffix"), ("x.arrow", b"ARROW1", "cannot be read as arrow"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, name, content, match):
    with pytest.raises(DataError, match=match) as error:
        read_pairs(put(tmp_path, name, content))
    assert "\n" not in str(error.value)


def test_files_kept_beside_the_data_are_not_taken_for_it(tmp_path):
    """The archive that a folder was unpacked from, a cache of `datasets`, a table of other things."""
    put(tmp_path, "metadata.jsonl", json_lines(("prompt", "chosen_file_name", "rejected_file_name")))
    pack(tmp_path / "original.zip", named(("1", 1)))
    (tmp_path / "cache-12.arrow").write_bytes(b"\x00")
    (tmp_path / "ratings.csv").write_text("name,value\nx,1\n")
    assert pairs_of(tmp_path) == ROWS
    two_sides(tmp_path / "two")
    (tmp_path / "two" / "prompts.txt").write_text("a cat\na dog\n")
    pack(tmp_path / "two" / "original.zip", named(("1", 1)))
    assert pairs_of(tmp_path / "two") == ROWS


def test_spaces_at_the_start_of_a_cell_stay_unless_the_names_have_them_too(tmp_path):
    text = "prompt,chosen,rejected\n a cat,1.png,2.png\n"
    assert pairs_of(put(tmp_path, "x.csv", text)) == [(" a cat", 1, 2)]
    spaced = 'prompt, chosen, rejected\n"a cat, on", 1.png, "2.png"\n'
    assert pairs_of(put(tmp_path, "x.csv", spaced)) == [("a cat, on", 1, 2)]


def test_quoted_cells_hold_separators_and_line_ends(tmp_path):
    text = 'prompt;chosen;rejected\n"a cat; on\n""a"" mat";1.png;2.png\n'
    assert pairs_of(put(tmp_path, "x.csv", text)) == [('a cat; on\n"a" mat', 1, 2)]


def saved(folder, n=1, stream=True):
    """What datasets.save_to_disk writes, made by hand: arrow files and state.json."""
    folder.mkdir(parents=True)
    names = []
    for k in range(n):
        rows = ROWS[k::n]
        columns = {
            "prompt": [p for p, *_ in rows],
            "chosen": structs([a for _, a, _ in rows]),
            "rejected": structs([b for *_, b in rows]),
        }
        values = pa.table(columns)
        names.append(f"data-{k:05d}-of-{n:05d}.arrow")
        new = pa.ipc.new_stream if stream else pa.ipc.new_file
        with pa.OSFile(str(folder / names[-1]), "wb") as sink, new(sink, values.schema) as writer:
            writer.write_table(values, max_chunksize=1)
    dump(folder / "state.json", {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None})
    dump(folder / "dataset_info.json", {"features": {}})
    return folder


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [True, False])
def test_a_saved_data_set_and_its_arrow_files(tmp_path, n, stream):
    folder = saved(tmp_path / "set", n, stream)
    (folder / "cache-1234.arrow").write_bytes((folder / f"data-00000-of-0000{n}.arrow").read_bytes())
    assert pairs_of(folder) == ROWS
    assert pairs_of(folder / f"data-00000-of-0000{n}.arrow") == ROWS[::n]


def test_splits_of_a_saved_data_set(tmp_path):
    saved(tmp_path / "train")
    saved(tmp_path / "test", 2)
    dump(tmp_path / "dataset_dict.json", {"splits": ["train", "test"]})
    assert pairs_of(tmp_path) == pairs_of(tmp_path, split="test") == ROWS
    with pytest.raises(DataError, match="holds no split 'validation', only train, test"):
        read_pairs(tmp_path, split="validation")
    (tmp_path / "test" / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00002.arrow: is missing, and state.json names it"):
        read_pairs(tmp_path, split="test")


def test_arrow_files_with_flipped_bits_are_read_or_named(tmp_path):
    file = saved(tmp_path / "set") / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    for place in range(0, len(whole), 97):
        data = bytearray(whole)
        data[place] ^= 0x10
        file.write_bytes(data)
        try:
            for pair in read_pairs(file, max_bad_fraction=1)[0]:
                shade(pair.winner)
        except ValueError as error:
            assert "\n" not in str(error)


def snapshot(tmp_path, name="datasets--me--set"):
    """A download of the hub's client: a folder of links to the blobs beside it."""
    repo, revision = tmp_path / name, tmp_path / name / "snapshots" / "0123abc"
    (repo / "blobs").mkdir(parents=True)
    revision.mkdir(parents=True)

    def add(name, data):
        blob = repo / "blobs" / f"{len(list((repo / 'blobs').iterdir())):040x}"
        blob.write_bytes(data)
        link = revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../" * (2 + name.count("/")) + f"blobs/{blob.name}")

    return revision, add


@pytest.mark.parametrize("kind", ["image folder", "images in a folder", "two folders", "captions"])
def test_the_links_of_a_download_are_followed_to_its_blobs(tmp_path, kind):
    revision, add = snapshot(tmp_path)
    inner = "images/" if kind == "images in a folder" else ""
    if kind == "two folders":
        for name, n in (("chosen/1", 1), ("rejected/1", 2), ("chosen/2", 3), ("rejected/2", 4)):
            add(f"{name}.png", png(n))
        add("prompts.txt", b"a cat\na dog\n")
    elif kind == "captions":
        for name, data in named(("1", 1), ("2", 2)):
            add(name, data)
        assert captions(revision) == {"p1": 1, "p2": 2}
        return
    else:
        for n in (1, 2, 3, 4):
            add(f"{inner}{n}.png", png(n))
        rows = [(p, f"{inner}{a}", f"{inner}{b}") for p, a, b in ROWS]
        add("metadata.jsonl", json_lines(("prompt", "chosen_file_name", "rejected_file_name"), rows).encode())
    assert pairs_of(revision) == ROWS


def test_links_to_other_places_are_refused_also_inside_a_download_until_they_are_copied(tmp_path):
    revision, add = snapshot(tmp_path)
    other, add_other = snapshot(tmp_path, "datasets--you--set")
    add_other("secret.png", png(1))
    add("2.png", png(2))
    (revision / "1.png").symlink_to(other / "secret.png")
    add("pairs.csv", csv_text(rows=ROWS[:1]).encode())
    with pytest.raises(DataError, match="'1.png' is a link that leads outside.*cp -rL FOLDER COPY"):
        read_pairs(revision)
    import shutil

    shutil.copytree(revision, tmp_path / "copy")  # follows links, as cp -rL
    assert pairs_of(tmp_path / "copy") == ROWS[:1]


@pytest.mark.parametrize("name", ["1.TXT", "1.Txt", "1.caption", "1.CAPTION"])
def test_texts_beside_pictures_under_any_suffix(tmp_path, name):
    pictures(tmp_path, "1.png")
    (tmp_path / "1.png").rename(tmp_path / "1.PNG")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfp1\r\n")
    assert captions(tmp_path) == {"p1": 1}


def test_a_folder_of_each_split_is_read_by_its_name(tmp_path):
    put(tmp_path / "train", "metadata.csv", csv_text(names=("prompt", "chosen_file_name", "rejected_file_name")))
    put(
        tmp_path / "test",
        "metadata.csv",
        csv_text(names=("prompt", "chosen_file_name", "rejected_file_name"), rows=ROWS[:1]),
    )
    assert pairs_of(tmp_path) == ROWS and pairs_of(tmp_path, split="test") == ROWS[:1]


def test_a_struct_of_bytes_in_a_fixed_list_is_a_list_of_pictures(tmp_path):
    images = pa.array([[{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}]], pa.list_(STRUCT, 2))
    path = table(tmp_path / "x.parquet", prompt=["a"], images=images, relevance=[[1.0, 0.0]])
    assert pairs_of(path) == [("a", 1, 2)]
