"""The report: its figures, its sections, and captions from strangers, which are shown and do nothing."""

import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import UndefinedError
from PIL import Image, ImageFont

import diffusion_align
from diffusion_align.evaluation import (
    Measured,
    as_csv,
    by_category,
    compare_metric,
    comparisons,
    distances_to,
    order_of_models,
    pairs_picture,
    summarise,
    write_report,
)
from diffusion_align.evaluation.contact_sheet import wrap
from diffusion_align.evaluation.markup import escape, templates
from diffusion_align.evaluation.report import choose_pairs, headline_sentence, without_secrets
from diffusion_align.evaluation.report_page import data_uri

N = 12
PROMPTS = [f"a small red circle number {i}" for i in range(N)]
BASE = {
    "clip": torch.linspace(0.1, 0.3, N),
    "judge/relation": torch.tensor([0.0, 1.0, math.nan] * 4),
    "judge/all": torch.tensor([0.0, 1.0, 0.0] * 4),
}
TUNED = {
    "clip": torch.linspace(0.1, 0.3, N) + 0.05,
    "judge/relation": torch.tensor([1.0, 1.0, math.nan] * 4),
    "judge/all": torch.tensor([1.0, 1.0, 0.0] * 3 + [0.0, 0.0, 0.0]),
}
ROWS = [
    {
        "step": s,
        "loss": 0.69 / s,
        "implicit_accuracy": 0.5 + s / 100,
        "winner_error_gap": -0.1 * s,
        "loser_error_gap": 0.1,
    }
    for s in range(1, 20)
]
TEXT_TAGS = {"title", "h1", "h2", "h3", "p", "td", "th", "dt", "dd", "pre", "figcaption", "span", "b", "text", "style"}
TAGS = TEXT_TAGS | {
    "html", "head", "meta", "body", "main", "section", "div", "table", "thead", "tbody", "tr", "figure", "img",
    "svg", "line", "path", "circle", "dl", "input", "label",
}  # fmt: skip


def pictures(index):
    return torch.full((3, 16, 16), index / N), torch.full((3, 16, 16), 1 - index / N)


class Page(HTMLParser):
    """Every tag, attribute and text of a page, as Python's own HTML parser reads it."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.captions, self.open = [], [], [], []
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.open.append(tag)
        if tag == "figcaption":
            self.captions.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if "figcaption" in self.open:
            self.captions[-1] += data


def write(tmp_path, prompts=PROMPTS, base=BASE, tuned=TUNED, headline="judge/all", further=None, **settings):
    figures = summarise(prompts, base, tuned, headline=headline, resamples=2000, model=settings.pop("model", "tuned"))
    settings = {"pictures": pictures, "rows": ROWS, **settings}
    report = write_report(tmp_path, figures | (further or {}), **settings)
    return report, (tmp_path / "report.html").read_text(encoding="utf-8")


def assert_harmless(markup):
    """No tag but ours, no attribute that runs or fetches, and nothing fetched but pictures inside the page."""
    page = Page(markup)
    assert set(page.tags) <= TAGS
    for tag, key, value in page.attributes:
        assert not key.startswith("on") and key not in (
            "href",
            "srcset",
            "action",
            "formaction",
            "srcdoc",
            "background",
        )
        assert key != "src" or (tag == "img" and value.startswith("data:image/png;base64,"))
        assert key != "style" or re.fullmatch(r"--c:var\(--c\d\)|--g:\d+;--l:\d+", value)
        assert tag != "input" or key in ("name", "id", "checked") or (key, value) == ("type", "radio")
    style = re.search(r"<style>(.*?)</style>", markup, re.DOTALL)
    assert style and "url(" not in style.group(1) and "@import" not in style.group(1)
    return page


def test_the_figures_are_those_of_the_comparison(tmp_path):
    report, _ = write(tmp_path, facts={"seed": 5}, config={"train": {"beta": 2000.0}})
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored == report
    c = compare_metric(BASE["judge/all"], TUNED["judge/all"], resamples=2000)
    assert stored["metrics"]["judge/all"]["low"] == c.low and stored["metrics"]["judge/all"]["wins"] == c.wins == 3
    assert stored["metrics"]["judge/relation"]["n"] == 8
    assert stored["reward_gap"]["clip"]["judge/all"]["table"] == [[3, 8, 1], [0, 0, 0], [0, 0, 0]]
    assert stored["prompts"][2]["base"]["judge/relation"] is None and len(stored["prompts"]) == N
    assert torch.__version__.startswith(stored["versions"]["torch"]) and stored["facts"] == {"seed": 5}
    assert stored["config"] == {"train": {"beta": 2000.0}}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_the_page_has_every_section_and_no_outside_resource(tmp_path):
    report, markup = write(tmp_path, facts={"sampler": "DPM-Solver++ 2M"}, config={"a": 1})
    page = assert_harmless(markup)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", "content", policy) in page.attributes and markup.index("Content-Security") < markup.index("<title")
    headings = re.findall(r"<h2>(.*?)</h2>", markup)
    assert headings == [
        "Pictures", "Attributes", "Rewards", "Win rate", "Reward against judge", "Training", "What made this", "Config",
    ]  # fmt: skip
    assert report["headline"]["sentence"] in page.text.replace("\xa0", " ") and "prefers-color-scheme:dark" in markup
    assert markup.count('class="chart"') == 3 and page.tags.count("img") == 2 * N
    assert "http" not in markup.replace("http-equiv", "")


def test_sections_without_data_are_left_out(tmp_path):
    rewards = {"clip": BASE["clip"]}, {"clip": TUNED["clip"]}
    report, markup = write(tmp_path, base=rewards[0], tuned=rewards[1], headline="clip", pictures=None, rows=())
    assert re.findall(r"<h2>(.*?)</h2>", markup) == ["Rewards", "Win rate", "What made this"]
    assert report["headline"]["sentence"].startswith(
        "From base to tuned, the mean of clip goes from 0.2 to 0.25: +0.05"
    )
    assert_harmless(markup)


def test_the_headline_states_uncertainty():
    base, tuned = torch.tensor([0.0, 1.0] * 50), torch.tensor([1.0, 1.0] * 50)
    sentence = headline_sentence("judge/all", compare_metric(base, tuned), share=True)
    assert re.fullmatch(
        r"From base to tuned, the fraction of pictures that show their whole prompt goes from 50\.0 % to 100\.0 %: "
        r"\+50\.0 points \(95 % interval \+4\d\.\d to \+(5\d|60)\.\d, n = 100 pairs\)\.", sentence
    )  # fmt: skip
    worse = headline_sentence("judge/all", compare_metric(tuned, base), share=True)
    assert "−50.0 points" in worse and "-" not in worse.replace("judge", "")
    unsure = compare_metric(torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert headline_sentence("judge/all", unsure, share=True).endswith("which does not rule out no change.")
    alone = compare_metric(torch.tensor([0.0]), torch.tensor([1.0]))
    assert "too few for an interval" in headline_sentence("judge/all", alone, share=True)


def test_pairs_shown_are_gains_losses_and_random_ones():
    base = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, math.nan, 0.0])
    tuned = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, math.nan, 1.0])
    tiebreak = torch.tensor([0.1, 0.3, 0.0, 9.0, 9.0, 9.0, 9.0, 0.2])
    chosen = choose_pairs(base, tuned, tiebreak, 6, seed=0)
    assert chosen[:3] == [(1, "gain"), (7, "gain"), (2, "loss")]
    assert [why for _, why in chosen[3:]] == ["drawn"] * 3 and len({i for i, _ in chosen}) == 6
    assert chosen == choose_pairs(base, tuned, tiebreak, 6, seed=0)
    assert {i for i, _ in choose_pairs(base, tuned, tiebreak, 100, seed=0)} == set(range(8))


def test_marks_and_pictures_belong_to_their_prompt(tmp_path):
    report, markup = write(tmp_path)
    figures = re.findall(r"<figure .*?>(.*?)</figure>", markup, re.DOTALL)
    for figure, entry in zip(figures, report["shown"], strict=True):
        index = entry["index"]
        base, tuned = re.findall(r'base64,(\S+?)"', figure)
        for shot, expected in zip((base, tuned), pictures(index), strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))))
            assert pixels.shape == (16, 16, 3) and np.all(pixels == round(expected[0, 0, 0].item() * 255))
        marks = ["✓" if scores["judge/all"][index] == 1 else "✗" for scores in (BASE, TUNED)]
        assert re.findall("[✓✗]", figure) == marks and PROMPTS[index] in figure


def test_pictures_are_numbered_by_gain_and_by_loss(tmp_path):
    """The orders that the page's style puts them in, worked out from the scores."""
    report, markup = write(tmp_path)
    places = [(int(g), int(w)) for g, w in re.findall(r'<figure style="--g:(\d+);--l:(\d+)"', markup)]
    gains = [float(TUNED["judge/all"][e["index"]] - BASE["judge/all"][e["index"]]) for e in report["shown"]]
    for which, sign in ((0, -1), (1, 1)):
        assert sorted(place[which] for place in places) == list(range(len(gains)))
        ordered = [gain for _, gain in sorted(zip([p[which] for p in places], gains, strict=True))]
        assert ordered == sorted(gains, key=lambda gain: sign * gain)


def test_the_breakdown_is_in_the_page_and_the_table(tmp_path):
    groups = torch.arange(N)
    features = {"base": torch.eye(N), "tuned": torch.eye(N) + 0.5, "other": torch.ones(N, N) + 0.1 * torch.eye(N)}
    base = [Measured("base", sampler, BASE, features["base"]) for sampler in ("dpmpp", "ddim")]
    models = [
        Measured("<b>tuned</b>", "dpmpp", TUNED, features["tuned"]),
        Measured("other", "dpmpp", BASE, features["other"]),
        Measured("<b>tuned</b>", "ddim", BASE, features["tuned"]),
        Measured("other", "ddim", TUNED, features["other"]),
    ]
    compared = comparisons(base, models, groups // 2, seed=0, resamples=2000)
    kinds = {"tag: two": [0, 1, 4], "tag: <i>one</i>": [2]}
    further = {
        "comparisons": compared,
        "order": order_of_models(compared, "judge/all"),
        "categories": by_category(BASE, TUNED, ["judge/all", "clip"], kinds, groups, seed=0, resamples=2000),
        "distances": distances_to(features["base"], [*base, *models]),
        "features": "eye",
    }
    table = as_csv(PROMPTS, kinds, [*base, *models])
    report, markup = write(tmp_path, further=further, table=table)
    assert (
        report["comparisons"][0]["metrics"]["judge/all"]["difference"] == report["metrics"]["judge/all"]["difference"]
    )
    assert report["order"] == {"dpmpp": ["<b>tuned</b>", "base", "other"], "ddim": ["other", "base", "<b>tuned</b>"]}
    assert "SAMPLERS DISAGREE" in markup and "&lt;b&gt;tuned&lt;/b&gt; &gt; base" in markup
    assert_harmless(markup)
    two = report["categories"]["tag: two"]["judge/all"]
    assert (two["n"], two["base"], two["tuned"]) == (3, pytest.approx(2 / 3), 1.0)
    assert [row["kid"] for row in report["distances"]][0] < report["distances"][2]["kid"]
    assert report["distances"][0]["few_for_frechet"] and "(few)" in markup
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert len(rows) == 6 * N and rows[4]["categories"] == "tag: two" and rows[4]["prompt"] == PROMPTS[4]
    assert float(rows[2 * N + 4]["clip"]) == pytest.approx(float(TUNED["clip"][4]), rel=1e-5)
    assert rows[2]["judge/relation"] == "" and rows[2 * N]["model"] == "<b>tuned</b>"


def test_a_prompt_is_not_a_formula_in_a_spreadsheet():
    prompts = ["=cmd|' /C calc'!A0", "+1", "-1", "@x", "\tx", "plain, with a comma", "\ud800", "a\nb"]
    measured = [Measured("m", "dpmpp", {"r": torch.zeros(len(prompts))})]
    rows = list(csv.DictReader(io.StringIO(as_csv(prompts, {}, measured), newline="")))
    assert [row["prompt"] for row in rows[:5]] == [f"'{prompt}" for prompt in prompts[:5]]
    assert rows[5]["prompt"] == prompts[5] and rows[6]["prompt"] == "\\ud800" and rows[7]["prompt"] == "a\nb"


def test_large_pictures_are_reduced():
    shot = Image.open(io.BytesIO(base64.b64decode(data_uri(torch.zeros(3, 300, 600)).partition(",")[2])))
    assert shot.size == (256, 128)


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no metric 'judge/none'"):
        write(tmp_path, headline="judge/none")
    with pytest.raises(ValueError, match=r"clip is \[3\]"):
        write(tmp_path, prompts=PROMPTS, base={**BASE, "clip": torch.zeros(3)})
    with pytest.raises(ValueError, match="no prompt"):
        write(tmp_path, prompts=[], base={"judge/all": torch.zeros(0)}, tuned={"judge/all": torch.zeros(0)})


def test_tokens_and_passwords_stay_out_of_both_files(tmp_path):
    secret = "hf_" + "AbCdEfGh1234567890"
    hub = {"password": "t0p", "note": f"use {secret} here"}
    config = {"hub_token": "t0p", "hub": hub, "list": [{"api_key": "t0p"}], "num_tokens": 77, "token": None}
    write(tmp_path, config=config, facts={"launch": f"HF_TOKEN={secret} run", "secret": "t0p"})
    for name in ("report.json", "report.html"):
        content = (tmp_path / name).read_text(encoding="utf-8")
        assert secret not in content and "t0p" not in content and "(hidden)" in content
    assert without_secrets(config)["num_tokens"] == 77 and without_secrets(config)["token"] is None


PAYLOADS = [
    "</script><script>alert(1)</script>",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    '" onfocus="alert(1)" autofocus="',
    "javascript:alert(1)",
    '<a href="javascript:alert(1)">x</a>',
    '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
    "</figcaption></figure></main></body></html><script>alert(1)</script>",
    "</style><style>*{display:none}</style>",
    "</title><script>alert(1)</script>",
    "<!--",
    "--><script>alert(1)</script><!--",
    "]]><script>alert(1)</script>",
    "<meta http-equiv=refresh content='0;url=//example.org'>",
    "<base href=//example.org>",
    "<link rel=stylesheet href=//example.org/x.css>",
    "<form action=//example.org><input name=q></form>",
    "&lt;script&gt;alert(1)&lt;/script&gt; &amp;amp; &#60;script&#62;",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "${7*7} {{7*7}} {% x %} <%= 7 %> `id` $(id)",
    "%3Cscript%3Ealert(1)%3C/script%3E",
    "=cmd|' /C calc'!A0",
    "a\nb\tc  d",
    "مرحبا بالعالم, שלום",
    "👩‍👩‍👧 ünïcødé 漢字 ﷽",
    "＜script＞alert(1)＜/script＞",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_captions_are_shown_word_for_word_and_do_nothing(tmp_path, payload):
    _, markup = write(tmp_path, prompts=[payload] * N)
    page = assert_harmless(markup)
    assert page.captions == [payload] * N
    assert page.tags.count("figure") == N  # no tag was closed early
    assert json.loads((tmp_path / "report.json").read_text())["prompts"][0]["prompt"] == payload


@pytest.mark.parametrize(
    ("payload", "shown"),
    [
        ("a\x00b", "a␀b"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("user\u202egnp.exe", "user[U+202E]gnp.exe"),
        ("\u2066a\u2069\u200f", "[U+2066]a[U+2069][U+200F]"),
        ("zero\u200bwidth\ufeff", "zero[U+200B]width[U+FEFF]"),
        ("line\u2028end\r\n", "line[U+2028]end␍\n"),
        ("lone \ud800 surrogate", "lone [U+D800] surrogate"),
        ("\ufffe \U0001ffff \ufdd0 \x85 \x7f", "[U+FFFE] [U+1FFFF] [U+FDD0] [U+0085] [U+007F]"),
        ("soft\u00adhyphen", "soft[U+00AD]hyphen"),
    ],
)
def test_invisible_characters_are_named(tmp_path, payload, shown):
    _, markup = write(tmp_path, prompts=[payload] * N)
    assert assert_harmless(markup).captions[0] == shown
    assert json.loads((tmp_path / "report.json").read_text())["prompts"][0]["prompt"] == payload


def test_a_long_caption_is_cut_visibly(tmp_path):
    _, markup = write(tmp_path, prompts=["<b>" * 350_000] * N)
    caption = assert_harmless(markup).captions[0]
    assert caption == "<b>" * 200 + "… [cut: 600 of 1,050,000 characters]" and len(markup) < 100_000


def test_hostile_names_config_and_facts_do_nothing(tmp_path):
    evil = '"><script>alert(1)</script>'
    base = {evil: BASE["clip"], f"{evil.replace('/', '')}/all": BASE["judge/all"]}
    tuned = {evil: TUNED["clip"], f"{evil.replace('/', '')}/all": TUNED["judge/all"]}
    base, tuned = ({key.replace("</", "<"): value for key, value in scores.items()} for scores in (base, tuned))
    _, markup = write(
        tmp_path, base=base, tuned=tuned, headline=next(iter(base)), title=evil,
        config={evil: evil}, facts={evil: [evil]},
        rows=[{"step": 1, "loss": evil, evil: evil}, {"step": 2, "loss": 0.5}],
    )  # fmt: skip
    page = assert_harmless(markup)
    assert page.text.count("alert(1)") >= 8


def test_escape_by_hand():
    assert escape("""<a href="x" id='y'>&amp;</a>""") == (
        "&lt;a href=&quot;x&quot; id=&#x27;y&#x27;&gt;&amp;amp;&lt;/a&gt;"
    )
    assert escape(3.5) == "3.5" and escape(None) == "None" and escape("") == ""
    assert escape("abcdef", 3) == "abc… [cut: 3 of 6 characters]" and escape("abc", 3) == "abc"


def test_templates_escape_what_they_show_without_being_asked(tmp_path):
    (tmp_path / "x.html.j2").write_text("{{ text }}|{{ text|upper }}|{{ [text]|join }}|{{ ready }}{{ missing }}")
    template = templates(tmp_path).get_template("x.html.j2")
    values = {"text": "<b>\u202e", "ready": escape("<i>")}
    assert template.render(values, missing="") == "&lt;b&gt;[U+202E]|&lt;B&gt;[U+202E]|&lt;b&gt;[U+202E]|&lt;i&gt;"
    with pytest.raises(UndefinedError, match="missing"):
        template.render(values)
    package = Path(diffusion_align.__file__).parent
    sources = [path.read_text() for path in package.rglob("*.j2")]
    assert sources and not [text for text in sources if re.search(r"\bsafe\b|\bautoescape\b", text)]


def test_the_contact_sheet_holds_every_pair_enlarged(tmp_path):
    base = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    tuned = 1 - base
    captions = ["short", "a caption that is much longer than its pair is wide, so it wraps", "", "x" * 5000, "\x00<b>"]
    marks = [(True, False), (None, True), (False, False), (True, True), (None, None)]
    pairs_picture(base, tuned, captions, marks, tmp_path / "sheet.png", columns=2, factor=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    side = 48
    assert sheet.shape[1] == 16 + 2 * (2 * side + 6 + 16)
    tops = []
    for i in range(5):
        big = [
            (image[i].permute(1, 2, 0).numpy() * 255).round().astype(int).repeat(3, 0).repeat(3, 1)
            for image in (base, tuned)
        ]
        left = 16 + (i % 2) * (2 * side + 6 + 16)
        column = sheet[:, left : left + side]
        found = [y for y in range(len(sheet) - side + 1) if np.array_equal(column[y : y + side], big[0])]
        assert len(found) == 1
        assert np.array_equal(sheet[found[0] : found[0] + side, left + side + 6 : left + 2 * side + 6], big[1])
        tops.append(found[0])
    assert tops[0] == tops[1] and tops[2] == tops[3]
    # Between two rows: the picture, its gap, its caption's lines of 17, the space, then the name's line and gap.
    font = ImageFont.load_default(13)
    lines = [len(wrap(caption, 2 * side + 6, font)) for caption in captions]
    assert lines[1] > 1 and lines[3] > 10
    assert tops[2] - tops[0] == side + 6 + 17 * lines[1] + 28 + 17 + 6
    assert tops[4] - tops[2] == side + 6 + 17 * lines[3] + 28 + 17 + 6
    assert (sheet == (30, 132, 73)).all(-1).any() and (sheet == (192, 57, 43)).all(-1).any()


def test_no_colour_without_marks(tmp_path):
    grey = torch.full((1, 3, 8, 8), 0.5)
    pairs_picture(grey, grey, ["x"], [(None, None)], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    assert (sheet.max(-1) == sheet.min(-1)).all()


def test_wrapped_lines_fit_and_keep_every_letter():
    font = ImageFont.load_default(13)
    for text in ("a small red circle left of a large blue square", "x" * 300, "word " * 40, "", "  spaced   out "):
        lines = wrap(text, 120, font)
        assert all(font.getlength(line) <= 120 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_sheet_needs_pairs_of_equal_numbers(tmp_path):
    images = torch.zeros(2, 3, 8, 8)
    for base, tuned, captions, marks in [
        (images[:0], images[:0], 0, 0),
        (images, images[:1], 2, 2),
        (images, images, 1, 1),
        (images, images, 2, 1),
    ]:
        with pytest.raises(ValueError, match="expected N"):
            pairs_picture(base, tuned, ["a"] * captions, [(None, None)] * marks, tmp_path / "sheet.png")
