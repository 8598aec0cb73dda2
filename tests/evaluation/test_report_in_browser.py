"""The report in headless Chromium, as a reader has it: a hundred hostile captions, tabs, order and slider.

Chromium and its driver come from the system (`apt-get install chromium chromium-driver`, which .ci/run does); without
them these tests are skipped, and test_report.py reads the same page with Python's parser.
"""

import json
import shutil
from urllib.parse import unquote

import pytest
import torch

from diffusion_align.evaluation import summarise, write_report

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="chromium and chromedriver are not installed")

ACTS = [
    "alert(1)", "fetch('http://127.0.0.1:9/x')", "document.title='owned'", "location='http://127.0.0.1:9/'",
]  # fmt: skip
SHELLS = [
    "<script>{}</script>", "</script><script>{}</script>", "<img src=x onerror={}>", "<svg/onload={}>",
    '"><img src=x onerror="{}">', "' onmouseover='{}", '" onfocus="{}" autofocus="', "javascript:{}",
    '<a href="javascript:{}">x</a>', '<iframe srcdoc="<script>{}</script>"></iframe>', "<body onload={}>",
    "</figcaption></figure></main></body></html><script>{}</script>", "</style><script>{}</script>",
    "</title><script>{}</script>", "--><script>{}</script><!--", "]]><script>{}</script>",
    "<details open ontoggle={}>", "<video><source onerror={}></video>", "<math><mtext><script>{}</script>",
    "<scr<script>ipt>{}</scr</script>ipt>", "&#60;script&#62;{}&#60;/script&#62;", "${{{}}} {{{{{}}}}} <%= {} %>",
]  # fmt: skip
OTHERS = [
    "<img src=http://127.0.0.1:9/a.png>", "<link rel=stylesheet href=http://127.0.0.1:9/x.css>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>", "<base href=http://127.0.0.1:9/>",
    "<object data=http://127.0.0.1:9/></object>", "<embed src=http://127.0.0.1:9/>",
    "<form action=http://127.0.0.1:9/><input name=q autofocus></form>",
    "</style><style>@import url(http://127.0.0.1:9/x.css)</style>", "<style>*{display:none}</style>", "<!--",
    "<plaintext>",
    "مرحبا بالعالم, שלום", "ünïcøde 漢字 👩‍👩‍👧",
]  # fmt: skip
CAPTIONS = [shell.replace("{}", act) for shell in SHELLS for act in ACTS][: 100 - len(OTHERS)] + OTHERS
N = len(CAPTIONS)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a hundred hostile prompts, open in a browser that writes down every request."""
    from selenium import webdriver

    folder = tmp_path_factory.mktemp("report")
    source = torch.Generator().manual_seed(0)
    base, tuned = ({"judge/all": torch.rand(N, generator=source).round()} for _ in range(2))
    hostile = CAPTIONS[0]
    further = {"order": {hostile: [hostile, "base"]}, "categories": {}, "comparisons": [], "features": hostile}
    figures = summarise(CAPTIONS, base, tuned, headline="judge/all", shown=N, resamples=2000, model=hostile)
    write_report(
        folder, figures | further, title=hostile, facts={hostile: hostile}, config={hostile: hostile},
        pictures=lambda i: (torch.zeros(3, 8, 8), torch.full((3, 8, 8), i / N)),
    )  # fmt: skip
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "window-size=1200,900", f"user-data-dir={folder / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get((folder / "report.html").as_uri())
    yield driver
    driver.quit()


def click(page, name):
    page.find_element("css selector", f"label[for={name}]").click()


def figures(page):
    """The captions of the figures in the order in which they are seen."""
    found = page.find_elements("tag name", "figure")
    places = [(f.location["y"], f.location["x"], f.find_element("tag name", "figcaption").text) for f in found]
    return [text for _, _, text in sorted(places)]


def test_hostile_captions_run_and_fetch_nothing(page):
    from selenium.common.exceptions import NoAlertPresentException

    assert len(CAPTIONS) == len(set(CAPTIONS)) == 100
    for tab in ("tab-result", "tab-kinds", "tab-pictures", "tab-how", "tab-pictures"):
        if page.find_elements("id", tab):
            click(page, tab)
    with pytest.raises(NoAlertPresentException):
        _ = page.switch_to.alert
    assert "owned" not in page.title and page.current_url.startswith("file://")
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    # The browser's own first page is chrome://..., which no other page may load.
    assert {url.partition(":")[0] for url in asked} - {"chrome", "chrome-untrusted"} == {"file", "data"}
    assert [unquote(url) for url in asked if url.startswith("file:")] == [unquote(page.current_url)]
    texts = page.execute_script("return [...document.querySelectorAll('figcaption')].map(f => f.textContent)")
    assert sorted(texts) == sorted(CAPTIONS)
    assert page.execute_script("return document.scripts.length") == 0


def test_tabs_show_one_panel_at_a_time(page):
    for tab, inside in (("tab-result", "Attributes"), ("tab-pictures", "Pictures"), ("tab-how", "What made this")):
        click(page, tab)
        shown = [e for e in page.find_elements("css selector", ".panel") if e.is_displayed()]
        assert len(shown) == 1 and inside in shown[0].text


def test_pictures_are_put_in_another_order(page):
    click(page, "tab-pictures")
    click(page, "by-gain")
    best = figures(page)
    click(page, "by-loss")
    worst = figures(page)
    assert sorted(best) == sorted(worst) and best != worst
    gains = {}
    for figure in page.find_elements("tag name", "figure"):
        marks = ["✓" in side.text for side in figure.find_elements("class name", "side")]
        gains[figure.find_element("tag name", "figcaption").text] = marks[1] - marks[0]
    assert [gains[text] for text in best] == sorted(gains.values(), reverse=True)
    assert [gains[text] for text in worst] == sorted(gains.values())


def test_the_slider_lays_one_picture_over_the_other(page):
    click(page, "tab-pictures")
    click(page, "slider")
    two = page.find_element("class name", "two")
    over, under = (two.find_element("css selector", f".{side} img") for side in ("base", "tuned"))
    assert over.rect == under.rect  # the same place and size, so that the parts of one cover those of the other
    cut = two.find_element("class name", "base")
    assert cut.value_of_css_property("resize") == "horizontal" and cut.value_of_css_property("overflow") == "hidden"
    assert cut.size["width"] == pytest.approx(two.size["width"] / 2, abs=3)
    click(page, "beside")
    assert over.rect["x"] != under.rect["x"]
