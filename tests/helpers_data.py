"""Tiny data sets of every layout, made in code: pictures of one shade, so that a picture can be told by its bytes."""

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(shade, size=(8, 8), format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, format=format)
    return buffer.getvalue()


def structs(shades):
    return pa.array([{"bytes": png(shade), "path": None} for shade in shades], STRUCT)


def table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def pictures(folder, *names):
    """Files named by their shade, such as 3.png or images/7.webp."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(int(path.stem.split("-")[0]), format=path.suffix[1:].upper().replace("JPG", "JPEG")))


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def comma_separated(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def tar(path, members, format=tarfile.PAX_FORMAT):
    """An archive of (name, bytes) or ready TarInfo members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if data is not None else info.size
            archive.addfile(info, io.BytesIO(data) if data is not None else None)
    return path
