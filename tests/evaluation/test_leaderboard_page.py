"""The leaderboard's page in Chromium, from a file, with hostile names and 2,000 rows."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.test_leaderboard import HOSTILE
from ubn_zoo.evaluation.leaderboard.board import Board, Row
from ubn_zoo.evaluation.leaderboard.render import board_html

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; on Debian: apt-get install chromium")


def row(model: str, top1: float, rank: int, **more: Any) -> Row:
    fields: dict[str, Any] = {
        "top1_err": 100 - top1, "top5": min(100.0, top1 + 15), "top5_err": 5.0, "img_size": 224, "param_count": 10.0,
        "crop_pct": 0.9, "interpolation": "bicubic", "norm": "ubn", "origin": "converted", "family": "resnet",
        "license": "apache-2.0", "images": 50_000, "top1_low": top1 - 0.4, "top1_high": top1 + 0.4, "gmacs": 2.0,
        "macts": 5.0, "rtx4090_bn": 1000.0, "sibling": "resnet18.a1_in1k", "top1_diff": 0.0, "measured": "cpu",
        "table": "x.csv", "date": "2026-11-01",
    }  # fmt: skip
    return Row(model=model, top1=top1, rank=rank, **(fields | more))


def small() -> list[Row]:
    return [
        row("regnety_160_ubn.bn_a", 82.0, 1, family="regnet", gmacs=16.0, param_count=83.6, license="mit"),
        row("resnet50_ubn.bn_a1_in1k", 80.5, 2, gmacs=4.2, param_count=25.9),
        row("mobilenetv3_large_100_ubn.bn_b", 76.0, 3, family="mobilenetv3", gmacs=0.26, param_count=5.6),
        row("resnet18_ubn", 70.0, 4, run="runs/ubn", origin="native", sibling="runs/bn", top1_diff=1.5, top1_low=None,
            top1_high=None, seeds="0 1", top1_std=0.25, gmacs=1.9, license=None),
        row("resnet18", 68.5, 5, run="runs/bn", origin="batchnorm", norm="bn", sibling=None, top1_diff=None, gmacs=1.8),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    strange = [
        row(
            text,
            60.0 - place,
            place + 1,
            family=text,
            license=text,
            run=text,
            settings=text,
            sibling=text,
            command=text,
        )
        for place, text in enumerate([*HOSTILE, "</script><script>alert(1)</script>"])
    ]
    many = [
        row(f"model{n}_ubn.bn_x", 90 - n / 40, n + 1, gmacs=0.1 + n % 97 / 5, param_count=1.0 + n % 31)
        for n in range(2000)
    ]
    tables = {"imagenet": small(), HOSTILE[0]: strange, "many": many}
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(board_html(Board(tables, {name: f"Set {name}" for name in tables})), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared(browser: Any) -> Iterator[Any]:
    """One tab for all tests, which fail if the page loads another file or logs an error."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("dialog", lambda dialog: (page.problems.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: page.problems.append(request.url) if page.address not in request.url else None)
    yield page


@pytest.fixture
def page(shared: Any, url: str) -> Iterator[Any]:
    shared.address = url
    shared.goto("about:blank")
    shared.problems.clear()
    shared.goto(url)
    yield shared
    assert shared.problems == []


def names(page: Any) -> list[str]:
    found: list[str] = page.locator("#table tbody th a").all_inner_texts()
    return found


def test_the_best_model_under_one_gmac_is_found_by_keyboard(page: Any) -> None:
    assert names(page)[0] == "regnety_160_ubn.bn_a" and page.locator("#count").inner_text() == "5 of 5 models"
    page.get_by_label("GMACs ≤").focus()
    page.keyboard.type("1")
    assert names(page) == ["mobilenetv3_large_100_ubn.bn_b"]
    assert page.locator("#count").inner_text() == "1 of 5 models"
    page.get_by_role("link", name="mobilenetv3_large_100_ubn.bn_b").last.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "mobilenetv3_large_100_ubn.bn_b"
    assert (
        'timm.create_model("mobilenetv3_large_100_ubn.bn_b", pretrained=True)'
        in page.locator("#model pre").inner_text()
    )
    page.go_back()
    assert names(page) == ["mobilenetv3_large_100_ubn.bn_b"]


def test_sorting_by_header_and_keyboard(page: Any) -> None:
    page.locator('[data-sort="gmacs"]').focus()
    page.keyboard.press("Enter")
    assert names(page)[0] == "mobilenetv3_large_100_ubn.bn_b"
    assert page.locator("th.gmacs").first.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert names(page)[0] == "regnety_160_ubn.bn_a"
    assert page.locator("th.gmacs").first.get_attribute("aria-sort") == "descending"
    page.locator('[data-sort="top1_diff"]').click()
    assert names(page)[0] == "resnet18_ubn" and names(page)[-1] == "resnet18"


def test_search_and_filters(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("RESNET native")
    assert names(page) == ["resnet18_ubn"]
    page.get_by_role("button", name="Reset").click()
    assert len(names(page)) == 5
    page.locator("select[name=family]").select_option("regnet")
    assert names(page) == ["regnety_160_ubn.bn_a"]
    page.get_by_role("button", name="Reset").click()
    page.locator("select[name=license]").select_option("not stated")
    assert names(page) == ["resnet18_ubn"]
    page.get_by_role("button", name="Reset").click()
    page.locator("select[name=origin]").select_option("batchnorm")
    assert names(page) == ["resnet18"]
    page.get_by_label("Search").fill("nothing")
    assert "No model matches" in page.locator("#table tbody").inner_text()
    page.reload()
    assert page.locator("#count").inner_text() == "0 of 5 models"


def test_models_are_shown_beside_their_twin(page: Any) -> None:
    page.get_by_role("link", name="resnet18_ubn", exact=True).first.click()
    text = page.locator("#model").inner_text()
    assert "± 0.25 over 2 seeds" in text and "+1.50" in text and "4 of 5" in text
    page.get_by_role("link", name="Compare with its sibling").click()
    rows = page.locator("#compare tbody tr").all_inner_texts()
    assert any(re.search(r"Set imagenet, top-1\s+70\.00 .*68\.50 .*\u22121\.50", text) for text in rows)
    page.goto(page.address)
    for name in ("Compare resnet50_ubn.bn_a1_in1k, 224 px", "Compare regnety_160_ubn.bn_a, 224 px"):
        page.get_by_label(name).check()
    page.locator("#tray").get_by_role("link", name="Compare").click()
    assert page.locator("#compare input").nth(1).input_value() == "regnety_160_ubn.bn_a, 224 px"
    assert "\u00d7 3.81" in page.locator("#compare").inner_text()


def test_the_chart_marks_the_front_and_opens_models(page: Any) -> None:
    dots = page.locator("#plot svg a")
    assert dots.count() == 5
    stops = page.locator('#plot svg a:not([tabindex="-1"])')
    front = ["mobilenetv3_large_100_ubn.bn_b", "resnet50_ubn.bn_a1_in1k", "regnety_160_ubn.bn_a"]
    assert sorted(text.split(",")[0] for text in stops.evaluate_all("all => all.map(a => a.ariaLabel)")) == sorted(
        front
    )
    page.locator("#front summary").click()
    assert [text.split(",")[0] for text in page.locator("#front li").all_inner_texts()] == front
    dots.first.hover()
    assert "M parameters" in page.locator("#plot svg").text_content()
    dots.first.click()
    assert page.locator("#model h2").is_visible()
    page.go_back()
    page.get_by_label("Across").select_option("ms")
    assert "No model here has a value" in page.locator("#plot").inner_text()


def test_names_stay_text(page: Any) -> None:
    page.goto(f"{page.address}#set={re.sub('.', lambda sign: f'%{ord(sign[0]):02x}', HOSTILE[0])}")
    shown = page.locator("#table tbody tr").all_inner_texts()
    expected = [*HOSTILE, "</script><script>alert(1)</script>"]
    expected[3] = r"\u202egnp.exe"
    for text, name in zip(shown, expected, strict=True):
        assert name in text.replace("\n", "")
    assert page.locator("img, main script").count() == 0
    for place in range(len(expected)):
        page.locator("#table tbody th a").nth(place).click()
        assert page.locator("#model h2").inner_text() == expected[place]
        assert page.locator("#model img").count() == 0
        assert not page.locator('#model a[href^="http"]').evaluate_all(
            "all => all.filter(a => !a.href.startsWith('https://huggingface.co/timm/')).length"
        )
        page.go_back()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    text = Path(download.value.path()).read_text("utf-8")
    assert "\"'=cmd()|' /C calc'!A0\"" in text or "'=cmd()|' /C calc'!A0" in text
    assert not re.search(r"(^|,)[=+@]", text, re.MULTILINE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_widths_and_themes(page: Any, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.reload()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    for view in ("", "#model=resnet50_ubn.bn_a1_in1k", '#compare=["resnet50_ubn.bn_a1_in1k, 224 px",""]'):
        page.goto(page.address + view)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")


def test_the_theme_button_overrides_the_system(page: Any) -> None:
    button = page.locator("#theme")
    for expected, color in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 31)")):
        button.click()
        assert button.inner_text() == f"Theme: {expected}"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == color
    page.reload()
    assert button.inner_text() == "Theme: dark"
    button.click()
    assert button.inner_text() == "Theme: auto"


def test_every_control_has_a_name_and_headings_are_in_order(page: Any) -> None:
    for view in ("", "#model=resnet18_ubn+%28runs%2Fubn%29", "#compare=[]"):
        page.goto(page.address + view)
        nameless = page.locator("a, button, input, select, summary").evaluate_all(
            "all => all.filter(e => e.checkVisibility() && !(e.innerText || e.ariaLabel || e.labels?.length)).length"
        )
        assert nameless == 0
        levels = page.locator("h1, h2, h3").evaluate_all(
            "all => all.filter(e => e.checkVisibility()).map(e => +e.tagName[1])"
        )
        assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_two_thousand_rows_within_a_second(page: Any) -> None:
    times = []
    for _ in range(2):
        page.goto("about:blank")
        page.goto(f"{page.address}#set=many")
        assert page.locator("#table tbody tr").count() >= 50
        times.append(page.evaluate("performance.getEntriesByType('navigation')[0].domComplete"))
    assert min(times) < 1000
    playwright.expect(page.locator("#table tbody tr")).to_have_count(2000, timeout=20_000)


def test_print_shows_all_rows_and_no_controls(page: Any) -> None:
    page.goto(f"{page.address}#set=many&q=model1")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#table tbody tr").count() == 1111
    page.goto(page.address)
    page.emulate_media(media="print")
    assert not page.locator("#filters").is_visible() and not page.locator("#theme").is_visible()
    assert page.locator("#scroll").evaluate("e => getComputedStyle(e).overflow") == "visible"
    page.emulate_media(media="screen")
