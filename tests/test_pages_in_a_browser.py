"""The pages in headless Chromium: wide and narrow, light and dark, in print; and nothing is ever asked for."""

import json
import os
import shutil

import pytest
from conftest import bench

import eckart
from eckart.testing import tiny_models, tiny_tokenizer
from eckart.text.calibration import Calibration

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; `apt-get install chromium` brings it"),
    pytest.mark.filterwarnings("default"),
    pytest.mark.xdist_group("browser"),
]

# Luminance contrast (WCAG 2) of every cell of every map, through a canvas, which knows what colours really are.
CONTRAST = """() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const luminance = (colour) => {
    context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(
      (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll(".map td:not(.none)")].map((cell) => {
    const style = getComputedStyle(cell);
    const [a, b] = [luminance(style.color), luminance(style.backgroundColor)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report with everything on it, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    tiny_models()["llama"]().save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text("Readable on a phone, in dark mode, without a network, and in print. " * 60)
    text = {"data_specs": ["text.txt"], "windows": 2, "length": 24}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        calibration = Calibration("text.txt", windows=4, length=24)
        eckart.compress("dense", recipe="eckart", keep=0.6, calibration=calibration, out="small")
        eckart.compress("dense", recipe="svd", keep=0.7, out="other")
        (folder / "bench.json").write_text(json.dumps(bench("small", 1.5)))
        hostile = "<img src=http://leak.example/x.png>"
        eckart.report("small", results=["bench.json"], against="dense", prompts=[hostile], **text)
        eckart.compare(["small", "other"], results=["bench.json"], out="compare.html", **text)
    return [folder / "small" / "report.html", folder / "compare.html"]


@pytest.fixture(scope="module")
def browser():
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_can_be_read_and_ask_for_nothing(pages, browser, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, said = [], []
    context.on("request", lambda request: asked.append(request.url))
    for path in pages:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.goto(path.as_uri(), wait_until="networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        assert all(contrast >= 4.5 for contrast in page.evaluate(CONTRAST))
        sizes = page.evaluate(
            "[...document.querySelectorAll('td, p, pre')].map(e => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 12
        for box in page.evaluate("[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width)"):
            assert 150 < box <= width
    assert asked == [path.as_uri() for path in pages]
    assert said == []  # where a blocked request or a broken style would show
    context.close()


def test_paper_is_white_even_at_night(pages, browser):
    page = browser.new_page(color_scheme="dark")
    page.goto(pages[0].as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()


def test_the_interception_sees_what_leaves(pages, browser, tmp_path):
    """The same listener, on a page that does ask: the test above can fail."""
    (tmp_path / "leak.html").write_text('<img src="http://127.0.0.1:9/x.png">')
    asked = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "leak.html").as_uri())
    assert "http://127.0.0.1:9/x.png" in asked
    page.close()
