"The page of a comparison: what it says, that it is one file, and that a click on the map changes the detail."

import json
import numpy as np
import pandas as pd
import pytest
from made import changed, weights, write
from gp_spectral.angles import read_comparison
from gp_spectral.cli import main
from gp_spectral.page import chart_json, map_rows, turn_map, what_turned, write_page


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    "A comparison of three small checkpoints, through the command line."
    root = tmp_path_factory.mktemp("page")
    w = weights()
    folders = [write(root / name, x) for name, x in dict(base=w, sft=changed(w, 0.02), rl=changed(w, 0.03, 9)).items()]
    assert main(["compare", *map(str, folders), "--out", str(root / "out")]) in (0, None)
    return root / "out"


def test_sentences_are_those_of_the_tables(compared):
    tables = read_comparison(compared)
    found, rows = what_turned(tables), map_rows(tables.angles)
    assert list(found) == ["base → sft", "base → rl", "sft → rl"]
    assert all(len(told) == 5 for told in found.values())
    of = rows[rows.pair == "base → sft"]
    most = of.loc[of.ratio.idxmax()]
    assert any(most.matrix in told and f"{most.ratio:.1f} times" in told for told in found["base → sft"])
    head = of[of.band == "head"]
    assert any(f"head {head.angle.mean():.3g}° ({head.ratio.mean():.2f} times)" in told for told in found["base → sft"])
    page = (compared / "report.html").read_text()
    assert all(told in page for told in found["base → rl"] if "‖" not in told)


def test_a_pair_that_is_equal_has_one_sentence(compared, tmp_path):
    "And no ratio of nothing to nothing."
    folder = write(tmp_path / "same", weights())
    assert main(["compare", str(folder), str(folder), "--out", str(tmp_path / "out")]) in (0, None)
    (told,) = what_turned(read_comparison(tmp_path / "out")).values()
    assert told == ["Nothing changed: every number is equal."] and "nan times" not in str(told)


def test_nothing_to_show_is_told(compared):
    empty = read_comparison(compared).angles.assign(mean=np.nan)
    with pytest.raises(ValueError, match="nothing was compared"):
        turn_map(empty)


def test_names_are_shown_and_not_run(compared, tmp_path):
    "A matrix may be called anything."
    tables = read_comparison(compared)
    evil = "</script><script>alert(1)</script>"
    angles = tables.angles.assign(matrix=evil, base="<b>base</b>")
    changes, parts = (t.assign(base="<b>base</b>") for t in tables[1:3])
    page = write_page(tables._replace(angles=angles, changes=changes, parts=parts), tmp_path / "x.html").read_text()
    assert "<script>alert" not in page and "<b>base</b>" not in page and "&lt;b&gt;base" in page
    assert json.loads(chart_json(turn_map(angles)))["datasets"] and "<" not in chart_json(turn_map(angles))


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(compared, browser, width):
    "No request, no error, not wider than the window; the detail follows a click, the map a drop-down."
    browser.set_window_size(max(width, 500), 1000)
    if width < 500:  # Chromium has no narrower window
        size = dict(width=width, height=1000, deviceScaleFactor=1, mobile=True)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get_log("browser")
        browser.get((compared / "report.html").as_uri())
        ready = "return document.querySelectorAll('#map svg .mark-rect path').length"
        wait(browser, ready)
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        inner = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.execute_script(inner) <= 0
        squares = "[...document.querySelectorAll('#map svg .mark-rect path')]"
        texts = "[...document.querySelectorAll('#map svg text')].map(t => t.textContent).filter(t => /layers/.test(t))"
        before, squares_there = (browser.execute_script(f"return {x}") for x in (texts, squares))
        other = next(s for s in squares_there if before[0] not in s.get_attribute("aria-label"))
        browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", other)
        other.click()
        wait(browser, f"return {texts}.join() != {json.dumps(','.join(before))}")
        colours = f"return {squares}.map(p => p.getAttribute('fill')).join()"
        head = browser.execute_script(colours)
        change = "const s = [...document.querySelectorAll('#map select')][2]; s.value = 'tail';"
        change += "s.selectedIndex = 2; s.dispatchEvent(new Event('change')); return true"
        browser.execute_script(change)
        wait(browser, f"{colours} != {json.dumps(head)}")
        assert [x for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def wait(browser, script, seconds=20):
    "Until a script gives something true."
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, seconds).until(lambda b: b.execute_script(script))


def test_a_page_is_small(compared):
    "Library and map: a 7B comparison has 1,344 rows a pair, and may take 6 MB."
    size, rows = (compared / "report.html").stat().st_size, len(read_comparison(compared).angles)
    library = len((compared / "report.html").read_text().split("</script>")[0])
    assert size < 1.5e6 and library + (size - library) / rows * 3 * 1344 < 6e6


def test_rows_of_one_seed_or_many_are_one_map():
    "The study's map has a square a matrix, whatever the number of seeds."
    from gp_spectral.report import _map

    row = dict(base="a", other="b", matrix="m", layer=0, kind="q", side="U", band="head", verdict="rotated")
    rows = [row | dict(seed=s, mean=0.1 * s, isotropic=0.1, floor=0.0, random_mean=1.0) for s in (1, 3)]
    (data,) = json.loads(_map(dict(angles=pd.DataFrame(rows))))["datasets"].values()
    assert len(data) == 1 and data[0]["ratio"] == pytest.approx(2.0)
    assert _map(dict(angles=pd.DataFrame(rows).drop(columns="isotropic"))) == ""  # of before there was the column
