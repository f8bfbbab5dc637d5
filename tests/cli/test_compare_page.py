"""The page of psa-compare: what is in it, and how it behaves in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from psa_diffusers.report.page import masks
from psa_diffusers.report.page.figures import time_parts
from psa_diffusers.report.page.render import player_data

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
VIDEOS = "[...document.querySelectorAll('video')]"


@pytest.fixture(scope="module")
def text(compared):
    return (compared / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element's name and attributes, and which were left open."""

    VOID = frozenset(("meta", "link", "img", "input", "br"))

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.found.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name


def test_the_page_is_whole_and_needs_no_network(text, compared):
    elements = Elements(text)
    assert elements.open == []
    for name, attributes in elements.found:
        for key in ("src", "href", "data", "poster"):
            target = attributes.get(key)
            if name == "use" or target is None or target.startswith(("#", "data:")):
                continue
            assert (compared / target).is_file(), (name, target)
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements.found:
        for key in ("href", "xlink:href"):
            if attributes.get(key, "").startswith("#"):
                assert attributes[key][1:] in ids


def test_the_page_says_what_was_measured(text, compared):
    results = json.loads((compared / "compare.json").read_text())
    for entry in results["totals"][1:]:
        assert f"{entry['psnr']['value']:.2f}" in text and f"{entry['ssim']['value']:.4f}" in text
    assert "psa-compare --prompts-file" in text and "No LPIPS" in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert [clip["name"] for clip in data["clips"]] == ["001-seed0", "001-seed1", "002-seed0", "002-seed1"]
    record = json.loads((compared / "videos" / "002-seed1" / "psa-3.json").read_text())
    assert data["clips"][3]["settings"]["psa-3"]["frames"] == [round(value, 2) for value in record["frames"]["psnr"]]


def test_the_player_has_the_frames_that_there_are(compared):
    """Where a pipeline makes another number than it was asked for."""
    results = json.loads((compared / "compare.json").read_text())
    results["video"]["num_frames"] = 7
    names = [(clip["clip"], clip["setting"]) for clip in results["clips"] if clip["setting"] != "dense"]
    records = {
        (clip, name): json.loads((compared / "videos" / clip / f"{name}.json").read_text()) for clip, name in names
    }
    assert player_data(results, records)["frames"] == 5


def test_a_prompt_cannot_become_markup(small_page):
    text = small_page("a red <script>alert(1)</script> & circle")
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; circle" in text


@pytest.fixture
def small_page(psa_compare, saved_model, tmp_path):
    def make(prompt):
        run = psa_compare("--prompt", prompt, "--model", saved_model, "--steps", 2, "--output", tmp_path / "out")
        assert run.code == 0, run.err
        return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    return make


def test_mask_pictures_have_the_colour_and_share_of_every_level(tmp_path):
    import base64
    import io

    mask = np.array([[0, 1, 2], [3, 4, 5]], dtype=np.int8)
    told = masks.describe_mask(mask, 1, 2, 3, 4)
    assert told["shares"] == dict.fromkeys(("full", "2x", "4x", "8x", "centroid", "skip"), pytest.approx(1 / 6))
    picture = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(told["picture"].removeprefix("data:image/png;base64,")))).convert("RGB")
    )
    colours = masks.css_colours(4)
    names = [["skip", "full", "2x"], ["4x", "8x", "centroid"]]
    for row in range(2):
        for column in range(3):
            assert "#" + bytes(picture[row, column]).hex() == colours[names[row][column]]
    assert told["text"].startswith("full 17%")
    large = masks.picture(np.ones((600, 300), np.int8), 4)
    assert Image.open(io.BytesIO(base64.b64decode(large.split(",")[1]))).size == (100, 200)


def test_seconds_add_up():
    record = {
        "kinds_of_steps": ["dense", "sparse", "sparse"],
        "seconds_of_steps": [3.0, 1.0, 1.5],
        "planning_seconds": 0.5,
        "attention_seconds": 1.0,
        "seconds_total": 7.0,
    }
    assert list(time_parts(record).values()) == [3.0, 0.5, 1.0, 1.0, 1.5]
    assert sum(time_parts(record).values()) == record["seconds_total"]


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium that plays H.264, e.g. Debian's package chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, compared):
    """Opens the page; what the console says must be nothing."""
    said, contexts = [], []

    def make(**options):
        contexts.append(browser.new_context(offline=True, **options))
        contexts[-1].set_default_timeout(180_000)  # for a busy machine
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((compared / "report.html").as_uri())
        page.wait_for_function(f"{VIDEOS}.every(video => video.readyState >= 2 && !video.seeking)")
        return page

    yield make
    for context in contexts:
        context.close()
    assert said == []


def times(page):
    return page.evaluate(f"{VIDEOS}.map(video => video.currentTime)")


def status(page):
    return page.locator("#status").inner_text()


def test_videos_play_in_step_and_start_again_at_the_end(open_page):
    page = open_page()
    assert page.evaluate("[...document.querySelectorAll('video')].every(video => video.videoWidth === 64)")
    assert page.evaluate(
        "[...document.querySelectorAll('video')].every(video => video.paused)"
    )  # nothing moves unasked
    page.get_by_role("button", name="Play").click()
    page.wait_for_timeout(50)
    assert page.evaluate(f"{VIDEOS}.every(video => !video.paused)")
    seen = []
    for _ in range(40):
        page.wait_for_timeout(25)
        seen.append(times(page))
    in_step = [max(three) - min(three) < 1.5 / 8 for three in seen]
    assert np.mean(in_step) > 0.9
    masters = [three[0] for three in seen]
    assert len(set(masters)) > 5 and any(after < before for before, after in pairwise(masters))
    page.get_by_role("button", name="Stop").click()
    still = times(page)
    page.wait_for_timeout(150)
    assert times(page) == still and max(still) - min(still) < 1e-3


def test_a_video_that_falls_behind_is_brought_back(open_page):
    page = open_page()
    page.locator("#speed").select_option("0.5")
    assert page.evaluate(f"{VIDEOS}.map(video => video.playbackRate)") == [0.5] * 3
    page.evaluate("document.getElementById('sparse').playbackRate = 0.1")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.getElementById('dense').currentTime > 3.5 / 8")
    dense, sparse, _ = times(page)
    assert abs(dense - sparse) < 1.5 / 8  # by itself it would be two frames and more behind
    page.get_by_role("button", name="Stop").click()


def test_keys_step_by_frames(open_page):
    page = open_page()
    page.locator("#stage").focus()
    assert status(page).startswith("Frame 1 of 5, PSNR ")
    for key, frame in (("ArrowRight", 2), (".", 3), ("ArrowLeft", 2), (",", 1), ("ArrowLeft", 1), ("End", 5), (".", 5)):
        page.keyboard.press(key)
        assert status(page).startswith(f"Frame {frame} of 5"), key
        assert [min(int(8 * seconds), 4) + 1 for seconds in times(page)] == [frame] * 3  # the last may be its end
    page.keyboard.press("Home")
    page.keyboard.press(" ")
    page.wait_for_function("!document.getElementById('dense').paused")
    page.keyboard.press(" ")
    page.wait_for_function("document.getElementById('dense').paused")
    page.locator("#frame").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")  # the slider's own
    assert status(page).startswith("Frame 2 of 5") and page.locator("#frame").input_value() == "1"
    page.get_by_role("button", name="One frame forward").focus()
    page.keyboard.press("Enter")
    assert status(page).startswith("Frame 3 of 5")
    assert "PSNR" in page.locator("#frame").get_attribute("aria-valuetext")


def test_views_and_the_wipe(open_page):
    page = open_page()

    def shown():
        return [page.locator(f"#{name}").is_visible() for name in ("dense", "sparse", "heat")]

    assert shown() == [True, True, False] and not page.locator("#wipe").is_visible()
    page.get_by_role("radio", name="Difference").check()
    assert shown() == [False, True, True]
    page.get_by_role("radio", name="Wipe").check()
    page.locator("#stage").scroll_into_view_if_needed()
    assert shown() == [True, True, False]
    boxes = [page.locator(f"#{name}").bounding_box() for name in ("dense", "sparse")]
    assert boxes[0] == boxes[1]  # on each other
    page.locator("#wipe").fill("25")
    assert page.evaluate("getComputedStyle(document.getElementById('sparse')).clipPath") == "inset(0px 0px 0px 25%)"
    page.mouse.move(boxes[0]["x"] + 0.6 * boxes[0]["width"], boxes[0]["y"] + 50)
    page.mouse.down()
    page.mouse.move(boxes[0]["x"] + 0.8 * boxes[0]["width"], boxes[0]["y"] + 50)
    page.mouse.up()
    assert page.locator("#wipe").input_value() == "80"
    page.locator("#stage").focus()
    page.keyboard.press("[")
    assert page.locator("#wipe").input_value() == "75"
    page.keyboard.press("v")
    assert page.locator("#stage").get_attribute("data-view") == "heat"


def test_another_clip_and_setting(open_page, compared):
    page = open_page()
    page.locator("#clip").select_option("3")
    page.locator("#setting").select_option("psa-3")
    page.wait_for_function("[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
    sources = page.evaluate(f"{VIDEOS}.map(video => video.currentSrc.split('videos/')[1])")
    assert sources == [f"002-seed1/{name}.mp4" for name in ("dense", "psa-3", "psa-3.difference")]
    record = json.loads((compared / "videos" / "002-seed1" / "psa-3.json").read_text())
    assert f"PSNR {record['psnr']:.2f} dB" in page.locator("#clip-figures").inner_text()
    assert page.locator("#chart polyline").count() == 2 and page.locator("#chart polyline.chosen").count() == 1
    page.locator("#chart svg").scroll_into_view_if_needed()
    box = page.locator("#chart svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 10, box["y"] + 40)
    assert status(page).startswith("Frame 5 of 5")


def test_level_masks_by_setting_and_step(open_page):
    page = open_page()
    visible = page.locator(".masks figure:visible")
    before = [visible.nth(i).inner_text() for i in range(visible.count())]
    assert before and all(text.startswith("step 1, layer ") for text in before)
    page.locator("#mask-step").select_option("3")
    assert visible.first.inner_text().startswith("step 3, layer ")
    page.locator("#mask-setting").select_option("1")
    assert page.locator(".group:visible h3").inner_text() == "psa-3" and visible.count() == len(before)
    assert page.evaluate("[...document.querySelectorAll('.masks img')].every(image => image.naturalWidth > 0)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_accessible_and_within_its_width(open_page, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for view in ("beside", "wipe", "heat"):
        page.locator(f"input[value={view}]").check()
        found = axe.Axe().run(page).response["violations"]
        assert [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 600) == (scheme == "light")


def test_without_a_script_videos_tables_and_figures_are_there(browser, compared):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((compared / "report.html").as_uri())
    assert page.locator("video[controls]").count() == 3
    assert page.locator("table").first.is_visible() and page.locator("section svg").first.is_visible()
    assert page.locator(".masks figure:visible").count() == page.locator(".masks figure").count() > 0
    context.close()


def test_everything_in_the_player_is_reached_by_tab(open_page):
    page = open_page()
    page.locator("#clip").focus()
    reached = []
    for _ in range(12):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
        page.keyboard.press("Tab")
    expected = ["clip", "setting", "view", "stage", "first", "back", "play", "forward", "frame", "speed"]
    assert [name for name in reached if name in expected] == expected
