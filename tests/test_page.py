"The pages: what they say, that each is one file, and that a click changes the details."

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from made import add_package, changed, weights, write
from gp_spectral.angles import Comparison, read_comparison
from gp_spectral.cli import main
from gp_spectral.page import (
    ANALYSES,
    analysis,
    change_rows,
    chart_json,
    dial_rows,
    hand_cards,
    map_rows,
    recovery_dial,
    shown_ranks,
    sigma_rows,
    turn_map,
    turned_most,
    what_turned,
    write_page,
)
from gp_spectral.report import checkpoint_steps, page_of
from gp_spectral.svd import spectrum


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


@contextmanager
def seen(browser, file, width):
    "A page in a window of this width; in the end nothing has gone wrong, and nothing was asked of anybody."
    browser.set_window_size(max(width, 500), 1000)
    if width < 500:  # Chromium has no narrower window
        size = dict(width=width, height=1000, deviceScaleFactor=1, mobile=True)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get_log("browser")
        browser.get(Path(file).as_uri())
        yield lambda script: browser.execute_script(f"return {script}")
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        inner = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.execute_script(inner) <= 0
        assert browser.get_log("browser") == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def click(browser, element):
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", element)
    element.click()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(compared, browser, width):
    "No request, no error, not wider than the window; the details follow a click, the map a drop-down."
    with seen(browser, compared / "report.html", width) as js:
        wait(browser, "return document.querySelectorAll('#map svg .mark-rect path').length")
        squares = "[...document.querySelectorAll('#map svg .mark-rect path')]"
        texts = "[...document.querySelectorAll('#map svg text')].map(t => t.textContent)"
        name, lines = f"{texts}.filter(t => /layers/.test(t))", "[...document.querySelectorAll('#map .mark-line path')]"
        titles = {"Singular values", "… and their relative change", "Sorted angles, band by band"}
        assert titles | {"Energy of ΔW by band, %"} <= set(js(texts))
        before, curves = js(name), f"{lines}.map(p => p.getAttribute('d')).join()"
        drawn, shares = js(curves), js(f"{texts}.join()")
        click(browser, next(s for s in js(squares) if before[0] not in s.get_attribute("aria-label")))
        wait(browser, f"return {name}.join() != {json.dumps(','.join(before))} && {curves} != {json.dumps(drawn)}")
        assert js(f"{lines}.length") == 7 and js(f"{texts}.join()") != shares  # three σ, their change, three bands
        colours = f"{squares}.map(p => p.getAttribute('fill')).join()"
        head = js(colours)
        change = "const s = [...document.querySelectorAll('#map select')][2]; s.value = 'tail';"
        change += "s.selectedIndex = 2; s.dispatchEvent(new Event('change')); return true"
        browser.execute_script(change)
        wait(browser, f"return {colours} != {json.dumps(head)}")


def wait(browser, script, seconds=20):
    "Until a script gives something true."
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, seconds).until(lambda b: b.execute_script(script))


def test_curves_are_those_of_the_matrices(compared):
    "σ that the page shows is σ; its change is of the numbers themselves, not of the rounded ones."
    tables = read_comparison(compared)
    whole = {name: spectrum(compared.parent / name, progress=False, cache=None) for name in ("base", "sft")}
    shown = {(r["checkpoint"], r["matrix"]): r for r in sigma_rows(tables.spectrum)}
    for row in change_rows(tables.spectrum, [("base", "sft")]):
        x, y = (t[t.matrix == row["matrix"]].sigma.to_numpy() for t in whole.values())
        at = np.array(row["rank"]) - 1
        np.testing.assert_allclose(shown["base", row["matrix"]]["sigma"], x[at], rtol=1e-3)
        np.testing.assert_allclose(row["change"], 100 * (y / x - 1)[at], rtol=1e-3, atol=1e-6)
    key = ["base", "other", "matrix", "side", "band"]
    ends = tables.profiles.groupby(key).angle.max()
    most = tables.angles.set_index(key)["max"]
    pd.testing.assert_series_equal(ends.sort_index(), most.sort_index(), check_names=False)


def test_a_comparison_of_before_there_were_curves(compared, tmp_path):
    "Its tables are read, and its page goes without."
    old = shutil.copytree(compared, tmp_path / "old")
    for name in ("spectrum", "profiles"):
        (old / f"{name}.parquet").unlink()
    tables = read_comparison(old)
    page = write_page(tables, tmp_path / "x.html").read_text()
    assert len(tables.spectrum) == 0 and '"Singular values"' not in page
    assert "sorted angles of each band are not" in page


def test_stacks_have_a_map_each(compared):
    angles = read_comparison(compared).angles
    both = pd.concat([angles.assign(stack=""), angles.assign(stack="vision_tower", matrix="v." + angles.matrix)])
    one, two = (turn_map(t).to_dict()["concat"][0] for t in (angles, both))
    assert "facet" not in one and two["facet"]["row"]["sort"] == ["main", "vision_tower"]
    assert two["resolve"]["scale"] == dict(x="independent", y="independent")


def test_what_turned_most_turned_beyond_noise(compared):
    "A band that turned less than noise of its size is none, however large its ratio among such."
    angles = read_comparison(compared).angles
    rows = turned_most(angles, 1000)
    beyond = angles[angles.verdict.isin(["rotated", "chance"]) & (angles["mean"] > angles.isotropic)]
    assert 0 < len(rows) < len(angles) and {x[0] for x in rows} == set(beyond.matrix) and len(rows) == len(beyond)
    assert turned_most(angles.assign(isotropic=10.0)) == [] == turned_most(angles.drop(columns="isotropic"))
    less = what_turned(read_comparison(compared)._replace(angles=angles.assign(isotropic=10.0)))
    assert all("Nothing turned further than noise as large as its change would." in told for told in less.values())


KINDS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
BANDS = ["head", "bulk", "tail"]


def of_7b(layers=32, seed=0):
    "Tables as those of a comparison of three 7B checkpoints, all pairs of them; the numbers are nothing."
    rng, named = np.random.default_rng(seed), ("Qwen2.5-7B-Instruct", "checkpoint-800", "checkpoint-829")
    pairs = [dict(base=named[i], other=named[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    names = [f"model.layers.{i}.{kind}.weight" for i in range(layers) for kind in KINDS]
    what = [dict(matrix=n, layer=int(n.split(".")[2]), kind=n.split(".")[4], stack="") for n in names]
    heads = pd.DataFrame([p | m for p in pairs for m in what])
    bands = heads.merge(pd.DataFrame([dict(side=s, band=b) for s in "UV" for b in BANDS]), "cross")
    some = lambda t, *columns: t.assign(**{c: rng.random(len(t)) for c in columns})
    shares = [f"dw_{u}_{v}" for u in BANDS for v in BANDS]
    at, place = pd.DataFrame(dict(rank=shown_ranks(3584))), pd.DataFrame(dict(place=np.linspace(0.01, 0.99, 16)))
    sigma = pd.DataFrame([dict(checkpoint=c) | m for c in named for m in what]).merge(at, "cross")
    return Comparison(
        angles=some(bands, "mean", "isotropic", "floor", "random_mean").assign(verdict="rotated"),
        changes=some(heads, *shares, "mean_abs_change", "weight_change", "intruders_U", "intruders_V"),
        parts=pd.DataFrame(pairs).assign(part="matrices", weight_norm=2.0, change_norm=1.0, outside=0.1),
        rows=pd.DataFrame(),
        spectrum=some(sigma, "sigma"),
        profiles=some(bands.drop(columns=["layer", "kind", "stack"]).merge(place, "cross"), "angle"),
    )


def test_a_page_is_small(compared, tmp_path):
    "That of a 7B comparison, three pairs with all curves, has 6 MB at most."
    assert (compared / "report.html").stat().st_size < 1.5e6
    tables = of_7b()
    assert len(tables.angles) == 3 * 1344 and len(tables.spectrum) > 40_000 < len(tables.profiles)
    assert write_page(tables, tmp_path / "x.html").stat().st_size < 6e6


def test_rows_of_one_seed_or_many_are_one_map():
    "The study's map has a square a matrix, whatever the number of seeds; without a column for noise it has angles."
    from gp_spectral.report import _map_part

    row = dict(base="base", other="end", matrix="m", layer=0, kind="q", side="U", band="head", verdict="rotated")
    rows = [row | dict(seed=s, mean=0.1 * s, isotropic=0.1, floor=0.0, random_mean=1.0) for s in (1, 3)]
    part = _map_part(dict(angles=pd.DataFrame(rows)), None)
    (square,) = next(d for d in json.loads(part["map"])["datasets"].values() if "ratio" in d[0])
    assert square["ratio"] == pytest.approx(2.0) and square["pair"] == "base → SFT_End"
    assert part["noise"] and len(part["most"]) == 1
    old = _map_part(dict(angles=pd.DataFrame(rows).drop(columns="isotropic")), None)
    assert not old["noise"] and old["most"] == [] and "by quantiles" in old["map"] and "isotropic:Q" not in old["map"]


SHIPPED = Path(__file__).parents[1] / "nbs/studies/rule/shipped"
EVIL = "</script><img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


def hands_of(checkpoints=("base", "max_ood", "end", "rl")):
    "Two hands, one of each rule; what a checkpoint answers is hostile, and what the verifier quotes of it, too."
    rows = []
    for rule in ("ID", "OOD"):
        for i, name in enumerate(checkpoints):
            who = dict(checkpoint=name, rule=rule, problem=0, hand="1 4 8", prompt=f"make 24 {EVIL}", seed=0, base=0)
            say = lambda n, right: dict(attempt=n, answer=f"try {n} {EVIL}", words=f"no: {EVIL}", solved=right)
            rows.append(who | dict(allowed=1) | say(1, i == 0 and rule == "ID"))
            rows += [who | dict(allowed=2) | say(n, n == 2 or rule == "OOD") for n in (1, 2)]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def of_study(tmp_path_factory):
    "The page of the shipped study, with hands of a hostile model."
    folder = shutil.copytree(SHIPPED, tmp_path_factory.mktemp("study") / "shipped")
    hands_of().to_parquet(folder / "hands.parquet")
    page = folder / "page.html"
    page.write_text(page_of(folder))
    return page


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_a_study_in_a_browser(of_study, browser, width):
    "A click on the dial changes its words; hands show a model's text and do not run it; claims fold out."
    of = lambda element: element.get_attribute("aria-label")
    with seen(browser, of_study, width) as js:
        for chart in ("success", "training", "map", "dial"):
            wait(browser, f"return document.querySelectorAll('#{chart} svg .mark-rect path, #{chart} svg text').length")
        told = "[...document.querySelectorAll('#dial svg text')].map(t => t.textContent)"
        told += ".filter(t => /% of the way/.test(t))"
        before = js(told)
        dial = [s for s in js("[...document.querySelectorAll('#dial svg .mark-rect path')]") if "size" in of(s)]
        edits = len(dial_rows(pd.read_parquet(SHIPPED / "recovery.parquet"))) - 2  # without both ends
        assert len(before) == 1 and len(dial) == edits
        click(browser, next(s for s in dial if "noise, equal edit" in of(s)))
        wait(browser, f"return {told}[0].startsWith('noise, equal edit, 20%')")
        assert (
            js("document.title") != "run" and js("document.querySelectorAll('#hands img, #hands script').length") == 0
        )
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        answers = js("[...document.querySelectorAll('#hands pre')].map(x => x.textContent)")
        assert len(answers) == 2 * (1 + 4 * 2) and answers[:2] == [f"make 24 {EVIL}", f"try 1 {EVIL}"]
        assert js("[...document.querySelectorAll('#hands p')].map(x => x.textContent)[0]") == f"✗ no: {EVIL}"
        shown = "[...document.querySelectorAll('#hands details')].map(d => d.checkVisibility())"
        for which, visible in (("OOD", [False, True]), ("apart", [False, False]), ("", [True, True])):
            browser.execute_script(
                f"const s = document.getElementById('which'); s.value = '{which}'; s.onchange({{target: s}})"
            )
            assert js(shown) == visible
        assert js("document.title") != "run" and js("document.querySelectorAll('.claim').length") == 8
        claim = js("document.querySelector('.claim td').checkVisibility()")
        assert claim


def test_a_study_has_the_page_that_its_tables_allow(of_study, tmp_path):
    "What is not stored is told, and no empty panel stands for it; three megabytes at most."
    page = of_study.read_text()
    assert len(page.encode()) < 3e6 and "Left out of this page" not in page
    shown = ('"Sorted angles, band by band"', '"Singular values"', 'id="hands"', 'id="turning"')
    assert not [x for x in shown if x not in page]
    for table, panel in zip(("profiles", "spectrum", "hands", "turning"), shown):
        old = shutil.copytree(of_study.parent, tmp_path / table)
        (old / f"{table}.parquet").unlink()
        page = page_of(old)
        assert panel not in page and f"({table})" in page and "Left out of this page" in page, table
    for name in ("preset.json", "evaluations.parquet"):
        shutil.copy(SHIPPED / name, tmp_path)
    least = page_of(tmp_path)
    assert 'id="success"' in least and not any(f'id="{x}"' in least for x in ("map", "dial", "training", "hands"))
    for table in ("claims", "sft_curve", "angles", "recovery", "hands", "spectrum", "profiles", "turning"):
        assert f"({table})" in least
    (tmp_path / "evaluations.parquet").unlink()
    with pytest.raises(ValueError, match="evaluations.parquet is missing"):
        page_of(tmp_path)


def test_of_several_ways_of_asking_the_longest_is_shown():
    first, second = hand_cards(hands_of(), dict(base="base", rl="RL"))
    assert (first["rule"], [p["name"] for p in first["players"]]) == ("ID", ["base", "RL"])
    assert [(p["solved"], p["at"]) for p in first["players"]] == [(True, 2)] * 2
    long = hands_of().assign(answer="x" * 5000)
    assert all(len(t["answer"]) < 1100 for t in hand_cards(long)[0]["players"][0]["turns"])


def test_an_edit_stands_beside_interpolation_of_its_size():
    recovery = pd.read_parquet(SHIPPED / "recovery.parquet")
    rows = dial_rows(recovery).set_index("edit")
    ends = rows.loc[["target whole", "donor whole"]]
    np.testing.assert_allclose(ends[["OOD", "ID"]], ends[["line_OOD", "line_ID"]])
    same = rows.loc["anchored 20%"], rows.loc["interpolate_to_norm 20%"]  # of the same size, seed by seed
    assert same[0]["size"] == pytest.approx(same[1]["size"])
    np.testing.assert_allclose(same[0][["line_OOD", "line_ID"]].tolist(), same[1][["OOD", "ID"]].tolist(), atol=1e-6)
    with pytest.raises(ValueError, match="rows of target and donor"):
        recovery_dial(recovery[recovery.method != "donor"])


def test_a_checkpoint_is_marked_once():
    "Where SFT_MaxOOD is SFT_End in some seeds, that step has one mark with both names."
    row = lambda seed, step, rate: {"step": step, "rule": "OOD", "set": "validation", "rate": rate, "seed": seed}
    curve = pd.DataFrame(
        [
            row(s, t, r)
            for s, best in ((0, 4), (1, 8))
            for t, r in ((0, 0.1), (4, 0.2), (8, 0.2 * (best == 8) + 0.1), (16, 0.9))
        ]
    )
    assert checkpoint_steps(dict(sft_curve=curve), 8) == {4: "SFT_MaxOOD (1 of 2)", 8: "SFT_MaxOOD (1 of 2), SFT_End"}


ANALYSIS = """
from gp_spectral.page import alt, analysis

@analysis("Theirs <i>", "Of another package.")
def theirs(tables):
    return alt.Chart(tables.changes[["matrix", "weight_change"]]).mark_bar().encode(x="matrix", y="weight_change")
"""


def test_analyses_of_others_are_on_the_page(compared, tmp_path, monkeypatch):
    "That of another package is imported and drawn, its words as words; one that fails costs nobody the page."
    monkeypatch.setattr("gp_spectral.page.ANALYSES", dict(ANALYSES))
    ours = len(ANALYSES)
    points = add_package(tmp_path, monkeypatch, "gp_spectral.analyses", "their_analysis", ANALYSIS)
    tables = read_comparison(compared)
    page = write_page(tables, tmp_path / "page.html").read_text()
    assert "<h2>Theirs &lt;i&gt;</h2>" in page and f'id="analysis-{ours + 1}"' in page
    assert "How much changed, layer by layer" in page
    analysis("Broken")(lambda tables: tables.no_such_table)
    points.write_text("[gp_spectral.analyses]\nbroken = no_such_module\n")
    with pytest.warns(UserWarning) as said:
        again = write_page(tables, tmp_path / "page.html").read_text()
    assert again == page
    told = " ".join(str(w.message) for w in said)
    assert "the analyses of no_such_module (broken) are left out" in told and "<lambda> is left out: Attr" in told
