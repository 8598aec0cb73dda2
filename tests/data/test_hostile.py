"""Archives and metadata made to do harm: nothing is written, run or read outside, and every one of them is reported."""

import gzip
import io
import json
import os
import pickle
import random
import tarfile
import zipfile

import pytest
from helpers_data import comma_separated, dump, lines, pictures, png, table, tar

from diffusion_align.data.bad_rows import BadRow, DataError
from diffusion_align.data.read import read_rows
from diffusion_align.data.rows.archives import limits, tar_rows
from diffusion_align.data.rows.raw_rows import read_bytes
from diffusion_align.data.rows.recognise import recognise

GOOD = [("good.png", png(7)), ("good.txt", b"fine")]
SECRET = png(99)


TEXT = ("x.txt", b"x")


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, None


def special(kind, link=""):
    """A sample whose picture is no file."""
    return [member("x.png", kind, link), TEXT]


def named(name):
    """A sample whose picture has this name, and whose text has one that goes with it."""
    return [(name, png(1)), (name.removesuffix(".png") + ".txt", b"x")]


def raw(name, kind, size=None, data=b"", number=None):
    """A header by hand, for what tarfile would not write: any size, in octal or, if negative, as base 256."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if number is not None:
        block[124:136] = number
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + b"\0" * (-len(data) % 512)


def joined(*parts):
    return b"".join(parts) + b"\0" * 1024


def pax(*records):
    text = b""
    for record in records:
        length = next(n for n in range(len(record), len(record) + 12) if n == len(f"{n} ") + len(record) + 1)
        text += b"%d %s\n" % (length, record)
    return text


class Payload:
    """What `pickle.load` would run."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


X = raw("x.png", b"0", data=png(1))
FINE = raw("good.png", b"0", data=png(7)) + raw("good.txt", b"0", data=b"fine")
# One member or sample is refused, the good one beside it is used.
REFUSED = {
    "a symbolic link": ("a symbolic link, not a plain file", special(tarfile.SYMTYPE, "/etc/passwd")),
    "a symbolic link beside": ("a symbolic link, not a plain file", special(tarfile.SYMTYPE, "../outside.png")),
    "a symbolic link to a good one": ("a symbolic link, not a plain file", special(tarfile.SYMTYPE, "good.png")),
    "a hard link": ("a hard link, not a plain file", special(tarfile.LNKTYPE, "/etc/passwd")),
    "a character device": ("a device, not a plain file", special(tarfile.CHRTYPE)),
    "a block device": ("a device, not a plain file", special(tarfile.BLKTYPE)),
    "a pipe": ("a pipe, not a plain file", special(tarfile.FIFOTYPE)),
    "up": ("leads outside", named("../x.png")),
    "up from below": ("leads outside", named("a/b/../../../x.png")),
    "up behind a dot": ("leads outside", named("./../x.png")),
    "up at the end": ("leads outside", [("a/..", b"x")]),
    "absolute": ("leads outside", named("/tmp/x.png")),
    "absolute twice": ("leads outside", named("//tmp/x.png")),
    "a drive": ("leads outside", named("C:\\x.png")),
    "up in the other way": ("leads outside", named("..\\x.png")),
    "absolute in the other way": ("leads outside", named("\\\\host\\x.png")),
    "a long name": ("has a name of", named("x" * 300 + ".png")),
    "a long path": ("has a name of", named("/".join(["d" * 60] * 5) + "/x.png")),
    "a text too long": ("bytes, over", [("x.png", png(1)), ("x.txt", b"x" * (limits.MAX_TEXT + 1))]),
    "a text that is no UTF-8": ("is not text in UTF-8", [("x.png", png(1)), ("x.txt", b"\xff\xfe\xfd")]),
    "JSON without an end": ("recursion", [("x.png", png(1)), ("x.json", b"[" * 100_000)]),
    "JSON that is no object": ("the prompt is NoneType", [("x.png", png(1)), ("x.json", b"[1]")]),
    "a prompt of half a letter": ("lone surrogate", [("x.png", png(1)), ("x.json", b'{"prompt": "\\ud800"}')]),
    "two of a kind": ("two members", [("x.png", png(1)), ("x.png", png(2)), ("x.txt", b"x")]),
    "two pictures": ("has 2 pictures", [("x.png", png(1)), ("x.jpg", png(2)), ("x.txt", b"x")]),
    "no text": ("has no text", [("x.png", png(1))]),
    "text alone": ("has 0 pictures", [("x.txt", b"x")]),
}
# The archive is refused whole.
BROKEN = {
    "nothing": b"",
    "not a tar": random.Random(0).randbytes(4096),
    "text": b"hello\n" * 300,
    "packed": gzip.compress(joined(FINE)),
    "cut in a header": joined(FINE, X)[:1800],
    "cut in a picture": FINE + raw("x.png", b"0", data=png(1) * 100)[:2000],
    "without an end": FINE,
    "a member longer than the archive": joined(FINE, raw("x.png", b"0", size=10**9)),
    "a member of less than nothing": joined(FINE, raw("x.png", b"0", number=b"\xff" * 12)),
    "a member of 2^80 bytes": joined(FINE, raw("x.png", b"0", number=b"\x80\0" + b"\x01" + b"\0" * 9)),
    "a name of a gigabyte": joined(FINE, raw("x", b"L", size=2**30)),
    "a name of a megabyte": joined(FINE, raw("x", b"L", data=b"x" * 2**20), X),
    "a header of a megabyte": joined(FINE, raw("x", b"x", data=pax(b"path=" + b"x" * 2**20)), X),
    "a record of no length": joined(FINE, raw("x", b"x", data=b"0 path=x\n"), X),
    "a record of a wrong length": joined(FINE, raw("x", b"x", data=b"99 path=x\n"), X),
    "a record without length": joined(FINE, raw("x", b"x", data=b"path=x\n"), X),
    "a size in words": joined(FINE, raw("x", b"x", data=pax(b"size=many")), X),
    "a size of twenty digits": joined(FINE, raw("x", b"x", data=pax(b"size=" + b"9" * 20)), X),
    "a size below zero": joined(FINE, raw("x", b"x", data=pax(b"size=-512")), X),
    "a changed header": joined(FINE, b"!" + X[1:]),
}
# Names that only an extended header can carry.
LATER = {
    "up by a header": ("leads outside", raw("x", b"x", data=pax(b"path=../x.png")) + X),
    "absolute by a header": ("leads outside", raw("x", b"x", data=pax(b"path=/tmp/x.png")) + X),
    "a zero by a header": ("leads outside", raw("x", b"x", data=pax(b"path=x\0.png")) + X),
    "up by a long name": ("leads outside", raw("x", b"L", data=b"../x.png\0") + X),
    "a long name": ("has a name of", raw("x", b"L", data=b"x" * 400 + b".png\0") + X),
    "a sparse file": ("a sparse file, not a plain file", raw("x.png", b"S", data=b"")),
    "a type of its own": ("of type b'Z', not a plain file", raw("x.png", b"Z", data=b"x")),
    "up for all": ("leads outside", raw("x", b"g", data=pax(b"path=../x.png")) + raw("../y.png", b"0", data=png(1))),
}


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def read(path):
    """Rows used and rows reported."""
    found = list(read_rows(recognise(path)))
    return [row for row in found if not isinstance(row, BadRow)], [row for row in found if isinstance(row, BadRow)]


@pytest.mark.parametrize("make", [*REFUSED, *(f"later: {name}" for name in LATER)])
def test_forbidden_members_are_refused(tmp_path, make):
    (tmp_path / "outside.png").write_bytes(SECRET)
    path = tmp_path / "set" / "x.tar"
    if make.startswith("later: "):
        reason, blocks = LATER[make.removeprefix("later: ")]
        path.parent.mkdir()
        path.write_bytes(joined(FINE, blocks))
    else:
        reason, members = REFUSED[make]
        tar(path, [*GOOD, *members])
    before = tree(tmp_path)
    good, bad = read(path)
    assert all(row.row.startswith("x.tar:") and "\n" not in row.reason for row in bad)
    assert any(reason in row.reason for row in bad), bad
    assert len(good) == 1 and good[0].prompt == "fine" and read_bytes(good[0].pictures[0]) == png(7)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("make", BROKEN)
def test_a_broken_archive_is_one_error_that_names_it(tmp_path, make):
    path = tmp_path / "x.tar"
    path.write_bytes(BROKEN[make])
    before = tree(tmp_path)
    with pytest.raises(DataError) as caught:
        read(path)
    said = str(caught.value)
    assert "x.tar" in said and "\n" not in said and len(said) < 400
    assert tree(tmp_path) == before


def test_there_are_enough_hostile_archives():
    assert len(REFUSED) + len(BROKEN) + len(LATER) >= 40


def test_nothing_in_an_archive_runs(tmp_path):
    """Pickles and weights are never opened, as webdataset's own defaults would."""
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    members = [*GOOD]
    members += [(f"good.{suffix}", payload) for suffix in ("pkl", "pickle", "pyd", "npy", "py", "so", "sh", "yaml")]
    members += [("good.pth", buffer.getvalue()), ("good.npz", buffer.getvalue()), ("good", payload)]
    source = recognise(tar(tmp_path / "x.tar", members))
    (row,) = read_rows(source)
    assert row.prompt == "fine" and not (tmp_path / "ran").exists()
    assert sum(source.unread.values()) == 11 and source.unread[".pkl"] == 1
    pickle.loads(payload)  # the payload does work
    assert (tmp_path / "ran").exists()


def test_a_picture_over_the_limit_and_too_many_members(tmp_path, monkeypatch):
    """A header may promise any size; a sparse file keeps the promise without a disk."""
    path = tmp_path / "x.tar"
    head = FINE + raw("x.png", b"0", size=limits.MAX_PICTURE + 1)
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + limits.MAX_PICTURE + 512)
        stream.seek(0, 2)
        stream.write(b"\0" * 1024)
    good, bad = read(path)
    assert len(good) == 1 and "268,435,457 bytes, over 268,435,456: refused" in bad[0].reason
    monkeypatch.setattr(tar_rows, "MAX_TAR_MEMBERS", 4)
    tar(path, [*GOOD, ("1.png", png(1)), ("1.txt", b"1")])
    assert len(read(path)[0]) == 2
    tar(path, [*GOOD, ("1.png", png(1)), ("1.txt", b"1"), ("2.png", png(1))])
    with pytest.raises(DataError, match="more than 4 members"):
        read(path)


def test_an_archive_that_shrinks_is_noticed(tmp_path):
    path = tar(tmp_path / "x.tar", GOOD)
    ((row,), _) = read(path)
    path.write_bytes(path.read_bytes()[:540])
    with pytest.raises(DataError, match="x.tar: is cut off at byte 540"):
        read_bytes(row.pictures[0])


def test_common_names_are_read(tmp_path):
    """Long ones up to 255 bytes, in folders, in every format of tar, with times that need an extended header."""
    long = "ü" * 100 + "/" + "x" * 40
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo(f"{long if format != tarfile.USTAR_FORMAT else 'd/x'}.png")
        info.mtime = 1.5 if format == tarfile.PAX_FORMAT else 1
        path = tar(
            tmp_path / "x.tar", [member("d/", tarfile.DIRTYPE), (info, png(3)), (f"{info.name[:-4]}.txt", b"x")], format
        )
        good, bad = read(path)
        assert not bad and read_bytes(good[0].pictures[0]) == png(3)


PATHS = {
    "up": "../outside.png",
    "up from below": "a/../../outside.png",
    "absolute": "{outside}/outside.png",
    "a link": "link.png",
    "a linked folder": "linked/outside.png",
    "the system's": "/etc/passwd",
    "a device": "/dev/zero",
    "this process": "/proc/self/environ",
    "a file address": "file://{outside}/outside.png",
    "a local address": "local://../outside.png",
    "a web address": "http://127.0.0.1:9/outside.png",
    "a command": "pipe:cat ../outside.png",
    "home": "~/outside.png",
    "a variable": "$PWD/../outside.png",
    "a pattern": "../*.png",
    "a zero": "0.png\0../outside.png",
    "a long one": "../" * 3000 + "outside.png",
    "a loop": "loop.png",
    "a pipe": "pipe.png",
    "the folder": ".",
    "nothing": "",
    "a list": ["../outside.png"],
    "an object": {"path": "../outside.png", "bytes": "x"},
    "a number": 1,
    "half a letter": "\ud800../outside.png",
    "percent": "%2e%2e/outside.png",
    "the other way": "..\\outside.png",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "outside.png").write_bytes(SECRET)
    folder = tmp_path / "set"
    pictures(folder, "0.png", "1.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def refused(path):
    """The rows are reported or the set is; no picture from outside was taken."""
    try:
        good, bad = read(path)
    except DataError as error:
        assert "\n" not in str(error)
        return
    assert bad and not any(read_bytes(picture) == SECRET for row in good for picture in row.pictures)


@pytest.mark.parametrize("name", PATHS)
def test_paths_of_metadata_stay_inside(folder, name):
    hostile = PATHS[name]
    if isinstance(hostile, str):
        hostile = hostile.replace("{outside}", str(folder.parent))
    before = {path for path in folder.parent.rglob("*")}
    good = {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}
    refused(lines(folder / "x.jsonl", [good, {**good, "rejected": hostile}]))
    refused(lines(folder / "y.jsonl", [{"prompt": "a", "images": ["0.png", hostile], "relevance": [1, 0]}]))
    refused(dump(folder / "x.json", [{"prompt": "a", "path1": hostile, "path2": "1.png"}]))
    refused(dump(folder / "y.json", [{"prompt": "a", "file_path": [hostile, "1.png"], "human_preference": [1, 0]}]))
    refused(dump(folder / "z.json", [{"prompt": "a", "generations": ["1.png", hostile], "ranking": [1, 2]}]))
    if isinstance(hostile, str) and "\ud800" not in hostile:
        refused(comma_separated(folder / "x.csv", [{"prompt": "a", "chosen": hostile, "rejected": "1.png"}]))
        refused(table(folder / "x.parquet", prompt=["a"], chosen=["0.png"], rejected=[hostile]))
    assert {path for path in folder.parent.rglob("*")} - before <= {folder / f for f in os.listdir(folder)}


@pytest.mark.parametrize("side", ["picture", "caption"])
def test_folders_of_captions_stay_inside(tmp_path, side):
    (tmp_path / "outside.png").write_bytes(SECRET)
    (tmp_path / "outside.txt").write_text("secret")
    folder = tmp_path / "set"
    pictures(folder, "0.png")
    (folder / "0.txt").write_text("fine")
    if side == "picture":
        (folder / "x.png").symlink_to(tmp_path / "outside.png")
        (folder / "x.txt").write_text("x")
    else:
        pictures(folder, "1.png")
        (folder / "1.txt").symlink_to(tmp_path / "outside.txt")
    refused(folder)
    try:
        assert "secret" not in json.dumps([row.prompt for row in read(folder)[0]])
    except DataError:
        assert side == "picture"
