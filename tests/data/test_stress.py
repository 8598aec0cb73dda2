"""Ten thousand rows, most of them broken in some way: each is used, a tie or reported, as whoever made it expects."""

import pytest
from stress import data
from stress.dataset.pictures import PICTURES

from diffusion_align.data.images import ImageError, decode_image

ROWS = 10_000


@pytest.mark.parametrize("name", [name for name, (data, _) in PICTURES.items() if data is not None])
def test_kinds_of_pictures(name):
    data, good = PICTURES[name]
    if good:
        assert decode_image(data).mode == "RGB"
    else:
        with pytest.raises(ImageError):
            decode_image(data)


def test_ten_thousand_rows(capsys):
    report = data.run(ROWS, clean=False)
    print(report)
    assert report["astray"] == [] and report["rows"] == ROWS
    assert all(report["found"][what] > 300 for what in ("used", "reported", "tie"))


def test_clean_rows_are_all_used():
    report = data.run(500, clean=True)
    assert report["astray"] == [] and report["found"] == {"used": 500}
