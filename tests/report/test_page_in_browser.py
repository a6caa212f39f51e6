"""The page report.html in Chromium: nothing is said or fetched, and what can be used works.

Skipped without playwright (the extra `[browser]`) or Chromium. With AXE naming axe.min.js of
axe-core (`npm pack axe-core`), contrast and labels are checked too.
"""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
from made_up_runs import HOSTILE, evaluation, training

from refine_jax.report.command import compare_runs

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra [browser]")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by what they are about."""
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        "training": [training(folder / "t", 300)],
        "hostile training": [training(folder / "</script>".replace("/", "⁄"), 40, texts=HOSTILE)],
        "trainings": [folder / "t", training(folder / "t2", 300, seed=1)],
        "evaluation": [evaluation(folder / "e", 60, texts=HOSTILE, before=True)],
        "evaluations": [evaluation(folder / "e1", 60), evaluation(folder / "e2", 60, seed=1)],
    }
    paths = {kind: folder / f"{kind}.html" for kind in runs}
    for kind, folders in runs.items():
        compare_runs(folders, paths[kind])
    return paths


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser, path: Path, width: int = 1280, scheme: str = "light"):
    """The page, with what its console said and what it asked for."""
    phone = width < 500
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        has_touch=phone,
        is_mobile=phone,
    )
    opened, said, asked = context.new_page(), [], []
    opened.on(
        "console",
        lambda message: message.type in ("error", "warning") and said.append(message.text),
    )
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(path.as_uri())
    if "training" in path.name:
        wait(opened, "figures.length > 5 && figures.every((figure) => figure.has_finished())")
    return opened, said, asked


TIP = (
    "Array.from(document.querySelectorAll('.bk-Tooltip'), "
    "(tip) => tip.shadowRoot.querySelector('.bk-tooltip-content').innerText).join(' ')"
    ".replace(/\\s+/g, ' ')"
)
"""What the library shows beside the pointer."""


def wait(opened, condition: str, seconds: float = 20.0) -> None:
    """Until a condition holds; the policy of the page allows playwright's own way no `eval`."""
    end = time.monotonic() + seconds
    while not opened.evaluate(condition):
        assert time.monotonic() < end, condition
        opened.wait_for_timeout(50)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    "kind", ["training", "hostile training", "trainings", "evaluation", "evaluations"]
)
def test_it_says_nothing_and_asks_for_nothing(browser, pages, kind, width):
    for scheme in ("light", "dark"):
        opened, said, asked = open_page(browser, pages[kind], width, scheme)
        title = opened.title()
        assert (said, asked) == ([], [pages[kind].as_uri()])
        assert title.endswith("refine-jax") and title != "ran"
        # Nothing is wider than the screen but what scrolls by itself.
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        if axe := os.environ.get("AXE"):
            opened.evaluate(Path(axe).read_text(encoding="utf-8"))
            found = opened.evaluate("axe.run(document, {resultTypes: ['violations']})")
            serious = [
                (each["id"], [node["html"] for node in each["nodes"]])
                for each in found["violations"]
                if each["impact"] in ("serious", "critical")
            ]
            assert serious == []
        opened.context.close()


def test_the_policy_keeps_other_scripts_from_running(browser, pages):
    """Even text that were not escaped could not run."""
    opened, said, _ = open_page(browser, pages["training"])
    opened.evaluate(
        "const made = document.createElement('script'); made.textContent = 'window.ran = 1';"
        "document.body.append(made); const image = document.createElement('img');"
        "image.setAttribute('onerror', 'window.ran = 2'); image.src = 'https://example.org/x.png';"
        "document.body.append(image);"
    )
    opened.wait_for_timeout(300)
    assert opened.evaluate("window.ran === undefined")
    refused = [each for each in said if "Content Security Policy" in each]
    assert len(refused) >= 3  # the script, the picture, and what its failure would run
    opened.context.close()


def test_curves_zoom_together_and_say_values(browser, pages):
    opened, _, _ = open_page(browser, pages["training"])
    whole = opened.evaluate("[figures[0].model.x_range.start, figures[0].model.x_range.end]")
    box = opened.locator(".chart").first.bounding_box()
    x, y = box["x"], box["y"] + box["height"] / 2
    opened.mouse.move(x + 0.5 * box["width"], y)
    wait(opened, f"{TIP}.includes('step')")
    said = opened.evaluate(TIP)
    found = re.search(r"training ?step ([\d,]+): ([\d.]+) ?running mean ([\d.]+)", said)
    assert 100 < int(found[1]) < 200 and 2 < float(found[2]) < 6
    opened.mouse.down()
    opened.mouse.move(x + 0.8 * box["width"], y, steps=5)
    opened.mouse.up()
    ranges = "figures.map((figure) => figure.model.x_range.end - figure.model.x_range.start)"
    wait(opened, f"{ranges}[0] < {0.6 * (whole[1] - whole[0])}")
    spans = opened.evaluate(ranges)
    assert max(spans) - min(spans) < 1e-6
    opened.locator("button.reset").first.click()
    wait(opened, f"{ranges}[0] > {0.99 * (whole[1] - whole[0])}")
    opened.context.close()


def test_fingers_scroll_over_curves_until_zooming_is_asked_for(browser, pages):
    opened, _, _ = open_page(browser, pages["training"], 390)
    touch = (
        "getComputedStyle(figures[0].canvas_view.shadow_el.querySelector('.bk-events')).touchAction"
    )
    assert opened.evaluate(touch) == "auto"
    button = opened.locator("button.drag").first
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert opened.evaluate(touch) != "auto"
    opened.context.close()


def test_dark_and_light_can_be_chosen(browser, pages):
    opened, _, _ = open_page(browser, pages["training"])
    drawn = (  # the colours of all pixels, of which those of axes and grids have one
        "(() => { const c = figures[0].canvas_view.primary.canvas;"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const seen = new Set(); for (let i = 0; i < d.length; i += 4)"
        " seen.add(d.slice(i, i + 4).join()); return seen; })()"
    )
    light, dark = "213,218,224,255", "52,59,68,255"
    assert opened.evaluate(f"{drawn}.has('{light}') && !{drawn}.has('{dark}')")
    opened.select_option("#theme", "dark")
    wait(opened, f"!{drawn}.has('{light}') && {drawn}.has('{dark}')")
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(15, 18, 22)"
    opened.context.close()


def test_the_slider_goes_through_the_evaluations(browser, pages):
    opened, _, _ = open_page(browser, pages["trainings"])
    assert opened.locator("#m-step").text_content() == "300"
    last = opened.locator("#m-text").evaluate("x => x.innerHTML")
    opened.locator("#m-at").fill("0")
    assert opened.locator("#m-step").text_content() == "0"
    first = opened.locator("#m-text").evaluate("x => x.innerHTML")
    assert first != last
    opened.get_by_label("P k").or_(opened.locator("input[value=match]")).last.check()
    assert opened.locator("#m-high").text_content() == "1"
    assert opened.locator("#m-text").evaluate("x => x.innerHTML") != first
    assert opened.locator(".position").count() == 8
    same = opened.locator(".position").first.locator(".same")
    assert same.count() == 2 and "✓" in same.first.text_content()
    opened.locator("#m-text span").nth(5).hover()
    assert "entropy before it" in opened.locator("#m-token").text_content()
    opened.select_option("#m-run", "1")
    assert opened.locator("#m-step").text_content() == "300"
    opened.context.close()


def test_answers_are_searched_and_filtered(browser, pages):
    opened, _, _ = open_page(browser, pages["evaluations"])
    shown = opened.locator("article:visible")
    assert shown.count() == 60
    opened.fill("#a-search", "niah_single_1/4096/7")
    assert shown.count() == 1
    opened.fill("#a-search", "")
    opened.select_option("#a-set", "niah_single_1/1024")
    assert shown.count() == 30
    opened.select_option("#a-kind", "changed")
    count = shown.count()
    assert 0 < count < 30
    assert opened.locator("#a-count").text_content() == f"{count} of 60 answers"
    opened.context.close()
