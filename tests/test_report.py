"The report: verdicts on numbers whose truth is known, and a page that shows them as they are."

import html
import re
import jinja2
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from gp_spectral import report
from gp_spectral.report import CLAIMS_HEAD, claims, claims_rows, contrast, fieller, success_rows, verdict
from gp_spectral.preset import Preset
from gp_spectral.stages import edit_name, recovery_plan


# The claims on made-up numbers: what the verdicts say when the truth is known.
def outcomes(seeds, hands, rate, rng):
    "True or False for each seed and hand, at a rate that differs little between seeds, and much between hands."
    hard = np.random.default_rng(hands).normal(size=(1, hands))  # the same for all
    p = np.clip(rate + 0.01 * rng.normal(size=(seeds, 1)) + 0.2 * hard, 0, 1)
    return (rng.random((seeds, hands)) < p).ravel()


def near(rng):
    return rng.uniform(0.95, 1.05)


def made_up(rates, edits, seeds=6, hands=600, seed=0):
    """Tables in which checkpoints and edits have the given OOD success.

    Spectra and angles are those of a training that turns and of noise that does not.
    """
    rng, at = (
        np.random.default_rng(seed),
        dict(
            seed=np.repeat(range(seeds), hands),
            problem=np.tile(range(hands), seeds),
            hand=[f"h{i}" for i in range(hands)] * seeds,
        ),
    )
    ev = pd.concat(
        [
            pd.DataFrame(
                at | dict(checkpoint=c, rule=rule, allowed=1, solved_first=outcomes(seeds, hands, r, rng), error="")
            )
            for c, r in rates.items()
            for rule in ("ID", "OOD")
        ]
    )
    rec = pd.concat(
        [
            pd.DataFrame(at | dict(edit=e, rule=rule, solved_first=outcomes(seeds, hands, r, rng)))
            for e, rs in edits.items()
            for rule, r in zip(("OOD", "ID"), rs if isinstance(rs, tuple) else (rs, 0.4))
        ]
    )
    curve = pd.DataFrame(
        [
            dict(seed=s, step=t, rule=rule, set=kind, rate=r)
            for s in range(seeds)
            for rule, kind, rs in (
                ("OOD", "validation", (0.3, 0.5, 0.2)),
                ("ID", "validation", (0.3, 0.2, 0.2)),
                ("ID", "seen", (0.3, 0.6, 0.9)),
            )
            for t, r in zip((0, 10, 20), rs)
        ]
    )
    losses = pd.DataFrame(
        [
            dict(seed=s, step=t, rule=r, loss=1 - t / 100)
            for s in range(seeds)
            for t in (0, 10, 20)
            for r in ("ID", "OOD")
        ]
    )
    pairs = [("base", "end", 0.2, 0.004), ("end", "rl", 0.02, 0.001), ("end", "noise", 0.01, 0.02)]
    # noise puts 1/40 of its energy on the diagonal of a matrix of 20 × 40, and 4 · 4 / (20 · 40) into the head's block
    energy = {"rl": (0.5 / 40, 0.1), "end": (0.8 / 40, 0.05), "noise": (1 / 40, 0.02)}
    sigma = pd.DataFrame(
        [
            dict(seed=s, base=a, other=b, matrix=m, layer=0, dw_diagonal=x * near(rng), dw_head_head=y * near(rng))
            for s in range(seeds)
            for a, b, *_ in pairs
            for m in "uvwxyz"
            for x, y in [energy[b]]
        ]
    )
    shape = dict(zip("uvwxyz", (0.3, 0.6, 1.0, 1.4, 2.0, 3.0)))
    other_shape = dict(zip("uvwxyz", (1.4, 0.3, 3.0, 0.6, 2.0, 1.0)))
    angles = pd.DataFrame(
        [
            dict(
                seed=s,
                base=a,
                other=b,
                matrix=m,
                layer=0,
                side=side,
                band=band,
                k=4,
                n={"U": 20, "V": 40}[side],
                sigma_change=c * near(rng),
                mean=t
                * (other_shape if b == "noise" else shape)[m]
                * rng.uniform(0.97, 1.03)
                * {"head": 1.5, "bulk": 1, "tail": 2}[band],
            )
            for s in range(seeds)
            for a, b, t, c in pairs
            for m in "uvwxyz"
            for side in "UV"
            for band in ("head", "bulk", "tail")
        ]
    )
    return dict(evaluations=ev, recovery_answers=rec, sft_curve=curve, losses=losses, sigma=sigma, angles=angles)


PAPER = dict(base=0.3, max_ood=0.6, end=0.2, rl=0.55, sft_10=0.5, rl_10=0.5, sft_40=0.1, rl_40=0.1)
EDITS = (
    {edit_name(**e): 0.2 for e in recovery_plan(Preset().tops, Preset().band)}
    | dict(target=(0.2, 0.7), donor=(0.6, 0.4))
    | {
        "uv 20%": 0.55,
        "anchored 20%": (0.57, 0.75),
        "interpolate_to_norm 5%": (0.3, 0.65),
        "interpolate_to_norm 10%": (0.35, 0.6),
        "interpolate_to_norm 20%": (0.4, 0.55),
        "interpolate_to_norm 40%": (0.5, 0.45),
        "anchored 20% + embeddings": (0.66, 0.7),
        "reset first 25%": 0.56,
        "reset first 100%": 0.5,
        "reset last 25%": 0.2,
        "sigma_only 100%": 0.21,
    }
)


def verdicts(tables):
    return [(r.claim, r.text, r.verdict) for r in claims(tables, end=20, band=0.2).itertuples()]


def test_claims_of_a_world_as_the_paper_says():
    found = verdicts(made_up(PAPER, EDITS))
    ours = ("held-out hands rises", "interpolation as far as", "does as much")  # made up to fall, and to give back half
    for claim, text, said in found:
        wanted = "not reproduced" if any(part in text for part in ours) else "reproduced"
        if claim == "C7" or "by that of noise of the same size" in text or "tail turns more" in text:
            continue  # not made up
        assert said == wanted, (claim, text, said)


def with_embeddings(tables, times=1.0):
    "The tables with a matrix outside the layers whose angles are those of `u`, RL's and SFT's times a factor."
    own = {}
    for name in ("angles", "sigma"):
        rows = tables[name].query("matrix == 'u'").assign(matrix="embed_tokens", layer=None)
        if name == "angles":
            rows["mean"] *= np.where(rows.other == "noise", 1, times)
        own[name] = pd.concat([tables[name], rows], ignore_index=True)
    return tables | own


def test_embeddings_have_a_row_of_their_own_and_move_no_other():
    tables = made_up(PAPER, EDITS)
    alone = claims(tables, end=20, band=0.2).set_index("text")
    for times, wanted in ((50.0, "reproduced"), (0.02, "not reproduced")):
        beside = claims(with_embeddings(tables, times), end=20, band=0.2).set_index("text")
        new = beside.index.difference(alone.index)
        assert len(new) == 1 and "the head of the embeddings turns more" in new[0]
        assert beside.verdict[new[0]] == wanted and not beside.primary[new[0]]
        pd.testing.assert_frame_equal(beside.loc[alone.index], alone)


CONTRARY = dict(base=0.6, max_ood=0.4, end=0.3, rl=0.2, sft_10=0.4, rl_10=0.6, sft_40=0.3, rl_40=0.6)


def test_claims_of_a_world_that_contradicts():
    worse = {"uv 20%": 0.1, "anchored 20%": (0.2, 0.45), "sigma_only 100%": 0.58}
    found = {t: v for _, t, v in verdicts(made_up(CONTRARY, EDITS | worse))}
    at = lambda part: next(v for t, v in found.items() if part in t)
    assert at("rises to a peak") == at("RL raises OOD") == at("more than half of the OOD") == "not reproduced"
    assert at("falls during SFT") == "reproduced" and at("does not exceed the SFT peak") == "untested"
    assert at("anchored merge gives back more") == at("takes no ID success") == "not reproduced"
    assert at("UV merge") == at("loss: anchored merge") == at("singular values alone") == "not reproduced"
    assert at("too short (step 10) RL does not heal") == at("RL gains more OOD success from") == "not reproduced"


@pytest.mark.parametrize("base", [0.3, 0.1], ids=["a good base", "a base below the end"])
def test_an_rl_that_does_nothing_passes_no_claim_on_rl(base):
    "The first version of the claims gave it C2 (bounded by the peak) and C7 (slope above zero)."
    still = PAPER | dict(base=base, rl=PAPER["end"], rl_10=PAPER["sft_10"], rl_40=PAPER["sft_40"])
    tables = made_up(still, EDITS)
    ev = tables["evaluations"].set_index(["checkpoint", "rule", "seed", "problem"]).solved_first
    same = dict(rl="end", rl_10="sft_10", rl_40="sft_40")  # the very same answers
    for rl, start in same.items():
        at = tables["evaluations"].checkpoint == rl
        keys = tables["evaluations"][at].assign(checkpoint=start)
        asked = pd.MultiIndex.from_frame(keys[["checkpoint", "rule", "seed", "problem"]])
        tables["evaluations"].loc[at, "solved_first"] = ev.loc[asked].to_numpy()
    found = [x for x in verdicts(tables) if x[0] in ("C2", "C3", "C7") and "does not heal" not in x[1]]
    assert found and "reproduced" not in {v for *_, v in found}


def test_an_edit_on_the_line_is_not_above_it():
    "An edit that is an interpolation, only called otherwise, gives back what interpolation gives back."
    twin = EDITS | {"anchored 20%": EDITS["interpolate_to_norm 20%"]}
    found = {t: v for _, t, v in verdicts(made_up(PAPER, twin, hands=1200))}
    assert next(v for t, v in found.items() if "anchored merge gives back more" in t) != "reproduced"


def test_a_seed_that_lost_nothing_is_not_left_out():
    tables = made_up(PAPER, EDITS)
    ev = tables["evaluations"]
    ev.loc[(ev.seed == 0) & (ev.checkpoint == "max_ood"), "solved_first"] = ev.loc[
        (ev.seed == 0) & (ev.checkpoint == "end"), "solved_first"
    ].to_numpy()
    row = claims(tables, end=20, band=0.2).query("claim == 'C2' and unit == 'of the loss'").iloc[0]
    assert row.seeds == 6 and np.isfinite(row.effect)


def test_one_seed_decides_nothing():
    assert {v for *_, v in verdicts(made_up(PAPER, EDITS, seeds=1))} <= {"undecided", "untested"}


def test_primary_verdicts_answer_for_each_other():
    table = claims(made_up(PAPER, EDITS), end=20, band=0.2)
    assert table.groupby("claim").primary.sum().eq(1).all()
    weak = table.assign(p=np.where(table.primary, 0.03, np.nan), verdict="reproduced", note="")
    after = report._adjusted(weak.copy())
    assert set(after.verdict[after.primary]) == {"undecided"} and set(after.verdict[~after.primary]) == {"reproduced"}
    assert after.note[after.primary].str.contains("alone it would be reproduced").all()


def with_twins(rates, tables):
    "The tables with the gate open, and with checkpoints of these rates among the answers."
    at = dict(edits={"target": 0.2}, seeds=6, hands=600, seed=5)
    more = made_up(rates, **at)["evaluations"] if rates else None
    gate = pd.DataFrame([dict(seed=s, start=x, success=0.3, n=192) for s in range(6) for x in (10, 20, 40)])
    return tables | dict(evaluations=pd.concat([tables["evaluations"], more]), gate=gate)


def test_rl_is_read_beside_its_twins():
    tables = with_twins(dict(constant=0.2, worked=0.55, rft=0.7), made_up(PAPER, EDITS))
    rows = claims(tables, end=20, band=0.2)
    said = {t: r.verdict for r in rows.itertuples() for t in report.TWINS.values() if t in r.text}
    no = "not reproduced"
    assert said == {"RL on a constant reward": "reproduced", "SFT that goes on": no, "RFT": no}
    assert not rows.note.str.contains("no twin").any()
    assert claims(made_up(PAPER, EDITS), end=20, band=0.2).note.str.contains("no twin").sum() == 2


@pytest.mark.parametrize("success", [0.02, 0.9])
def test_without_a_signal_rl_has_no_verdict(success):
    "What memorised hands, or none that can be solved, teach is nothing; a start's own gate shuts its own rows."
    tables = with_twins({}, made_up(PAPER, EDITS))
    gate = tables["gate"]
    shut = claims(tables | dict(gate=gate.assign(success=gate.success.where(gate.start != 20, success))), 20, 0.2)
    of_rl = shut[shut.claim.isin(["C2", "C3", "C7"])]
    free = of_rl.text.str.contains("too short|too long") & ~of_rl.primary
    assert set(of_rl.verdict[~free]) <= {"no signal", "untested"} and "no signal" in set(of_rl.verdict)
    assert "no signal" not in set(of_rl.verdict[free]) and "no signal" not in set(shut[shut.claim == "C6"].verdict)
    assert of_rl.note[of_rl.verdict == "no signal"].str.contains("10% to 60% are asked for").all()
    assert of_rl.p[of_rl.verdict == "no signal"].isna().all()


def test_a_fall_is_reading_or_skill():
    "One world in which SFT makes the model misread, one in which it forgets how to solve."
    tables = made_up(PAPER | dict(base=0.48, end=0.16), EDITS)
    ev, rng = tables["evaluations"], np.random.default_rng(0)
    for lost, R, Q in (("reading", dict(base=0.96, end=0.32), 0.5), ("skill", dict(base=0.8, end=0.8), None)):
        read = [rng.random() < R.get(c, 0.9) for c in ev.checkpoint]
        solved = [rng.random() < (Q or {"base": 0.6, "end": 0.2}.get(c, 0.4)) for c in ev.checkpoint]
        rows = claims(tables | dict(evaluations=ev.assign(read=read), forced=ev.assign(solved_first=solved)), 20, 0.2)
        at = lambda part: rows[rows.text.str.contains(part) & (rows.claim == "C1")].iloc[0]
        assert at("at least half").verdict == ("reproduced" if lost == "reading" else "not reproduced")
        parts = at("this, reading").effect, at("this, solving").effect
        assert abs(sum(parts) + 0.32) < 0.06 and (parts[0] < parts[1]) == (lost == "reading")
        told = ev.assign(read=read, solved_first=solved)[(ev.rule == "OOD") & (ev.allowed == 1)]
        mean = told.groupby(["seed", "checkpoint"])[["read", "solved_first"]].mean()
        whole = (mean.read * mean.solved_first).unstack("checkpoint")  # the two add up, whatever goes together
        assert sum(parts) == pytest.approx((whole["end"] - whole["base"]).mean(), abs=1e-9)


def test_bases_are_the_units_where_there_are_several():
    "Twelve seeds of six bases are six draws, however well the seeds of a base agree."
    tables = made_up(PAPER, EDITS, seeds=12)
    several = tables | dict(evaluations=tables["evaluations"].assign(base=lambda t: t.seed % 6))
    assert set(claims(tables, 20, 0.2).query("verdict != 'untested'").seeds) == {12}
    assert set(claims(several, 20, 0.2).query("verdict != 'untested'").seeds) == {6}
    ax = report.plot_recovery_bars(several, 0.2)
    bounds = [line.get_segments()[0][:, 1] / 100 for line in ax.collections]  # the picture has the table's intervals
    row = claims(several, 20, 0.2).query("text.str.contains('loss: UV merge')", engine="python").iloc[0]
    assert bounds[0] == pytest.approx([row.low, row.high])
    rows = pd.DataFrame(dict(seed=[0, 1, 2, 3], hand=list("abcd"), x=[0.0, 0.0, 1.0, 1.0]))
    halved = report._by_unit(rows, pd.Series([0, 0, 1, 1]))
    assert contrast(halved, "x")[3] == 2 and contrast(rows, "x")[3] == 4


@pytest.mark.slow
def test_intervals_cover_as_they_say_and_decide_as_they_should():
    """Two thousand made-up studies with the variance components of the tiny study's gain (method of moments).

    Six seeds, 400 problems on 137 hands. Coverage within 93 to 97 %; a null effect is decided in at most 7 %; an
    effect of 4.7 points, said to be found in four of five studies, in 70 % at least.
    """
    rng, seeds, hands, problems = np.random.default_rng(1), 6, 137, 400
    hand = rng.integers(0, hands, problems)
    rows = pd.DataFrame(dict(seed=np.repeat(range(seeds), problems), hand=np.tile(hand, seeds)))
    sd = np.sqrt([0.00044, 0.003, 0.040, 0.075])  # seed, hand, seed × hand, rest
    inside = power = wrong = 0
    for _ in range(2000):
        between = sd[0] * rng.normal(size=(seeds, 1)) + sd[1] * rng.normal(size=hands)[hand]
        both = sd[2] * rng.normal(size=(seeds, hands))[:, hand]
        x = (between + both + sd[3] * rng.normal(size=(seeds, problems))).ravel()
        _, low, high, _ = contrast(rows.assign(x=x), "x")
        inside += low <= 0 <= high
        wrong += verdict(low, high) == "reproduced"
        power += verdict(low + 0.047, high + 0.047) == "reproduced"
    assert 0.93 <= inside / 2000 <= 0.97 and wrong / 2000 <= 0.035 and power / 2000 >= 0.70


def test_an_edit_that_was_not_priced_is_named():
    tables = made_up(PAPER, EDITS)
    with pytest.raises(ValueError, match="no edit 'anchored 30%': it has .*anchored 20%"):
        claims(tables, end=20, band=0.3)


def test_one_start_of_rl_tests_two_claims_not():
    few = {k: v for k, v in PAPER.items() if k in ("base", "max_ood", "end", "rl")}
    table = claims(made_up(few, EDITS), end=20, band=0.2)
    rows = [row for row in claims_rows(table) if row[0][:2] in ("C3", "C7")]
    assert [row[0] for row in rows] == ["C3 primary", "C7 primary"]
    assert all("RL has one start" in row[1] and row[2:4] == ("–", "–") and row[6] == "untested" for row in rows)


def test_a_verdict_wants_the_whole_interval():
    for side, wanted in ((">", "reproduced"), ("<", "not reproduced")):
        assert verdict(0.51, 0.9, 0.5, side) == wanted
        assert verdict(0.1, 0.49, 0.5, side) != wanted
        assert verdict(0.5, 0.9, 0.5, side) == verdict(0.1, 0.5, 0.5, side) == "undecided"
    within = [verdict(*ends, 0.03, "within") for ends in ((-0.02, 0.02), (-0.02, 0.04), (-0.04, 0.02), (0.04, 0.05))]
    assert within == ["reproduced", "undecided", "undecided", "not reproduced"]
    assert fieller(np.array([0.1, -0.1]), np.eye(2), 5)[1:3] == (-np.inf, np.inf)  # what was lost is not a loss


HOSTILE = "<script>alert(\"1\")</script> & {{ 7 * 7 }} 'quoted'"


def made_page(preset=Preset(), command=HOSTILE, note=""):
    tables = made_up(PAPER, EDITS)
    ev = tables["evaluations"].assign(solved=lambda t: t.solved_first)
    tables |= dict(
        evaluations=ev,
        claims=claims(tables, end=20, band=0.2).assign(note=note),
        times=pd.DataFrame(dict(seed=[0, 0], stage=[note or "sft", "ppo"], seconds=[30.0, 6000.0])),
    )
    about = dict(layer=0, kind=HOSTILE, floor=0.0, isotropic=0.1, random_mean=1.0, verdict="rotated")
    drawn = dict(
        angles=tables["angles"].assign(**about),
        sigma=tables["sigma"].assign(weight_change=0.01, mean_abs_change=0.01),
        sft_curve=tables["sft_curve"].assign(wrong_rule=0.1),
    )
    return tables, report._page(preset, tables | drawn, [(HOSTILE, HOSTILE, b"\x89PNG")], command)


def without_scripts(page):
    "The page's own words: without the drawing library, and without the few lines that use it."
    assert re.findall(r"<script>(.)", page, re.S)  # there are some
    return re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def test_whatever_is_typed_is_shown_and_not_run():
    "In every place that a person can fill: the note, the model's name, rules, the command, titles, names of stages."
    preset = Preset()
    for key in ("note", "model", "id_rule", "ood_rule", "target", "rl"):
        object.__setattr__(preset, key, HOSTILE)  # past what a preset itself would refuse
    _, page = made_page(preset, note=HOSTILE)
    assert "<script" not in without_scripts(page) and "<script>alert" not in page
    assert html.unescape(re.findall(r"<code>(.*?)</code>", page)[0]) == HOSTILE
    assert html.unescape(re.findall(r'<img alt="(.*?)"', page)[0]) == HOSTILE
    assert html.unescape(re.findall(r"<strong>(.*?)</strong>", page, re.S)[0]) == HOSTILE


def test_the_page_shows_every_row():
    tables, page = made_page()
    page = without_scripts(page)
    cells = [html.unescape(x) for x in re.findall(r"<td.*?>(.*?)</td>", page)]
    rows = [*claims_rows(tables["claims"]), *success_rows(tables)]
    most = page[page.index("Turned most") : page.index("Test success in numbers")].count("<td")  # see test_page
    shown = cells[: 7 * len(tables["claims"])] + cells[7 * len(tables["claims"]) + most :]
    assert shown == [cell for row in rows for cell in row]
    heads = [html.unescape(x) for x in re.findall(r"<th>(.*?)</th>", page)]
    assert (
        heads[: 7 * len(CLAIMS_HEAD)] == 7 * CLAIMS_HEAD and heads[-len(report.SUCCESS_HEAD) :] == report.SUCCESS_HEAD
    )
    colours = re.findall(r'<td data-head="verdict" class="(\w+)">(.*?)</td>', page)
    wanted = {"reproduced": "reproduced", "not": "not reproduced", "undecided": "undecided", "untested": "untested"}
    assert len(colours) == len(tables["claims"]) and set(colours) <= set(wanted.items())
    primary = tables["claims"].query("primary").set_index("claim").verdict
    assert re.findall(r'<span class="said \w+">(.*?)</span><b>(C\d)', page) == [(v, c) for c, v in primary.items()]
    assert "ppo 1.7 h, sft 30 s; in all 1.7 h" in re.sub(r"\s+", " ", page)


def test_a_letter_has_a_name_and_the_papers_words():
    "No page says C3 without saying what C3 is."
    _, page = made_page()
    for letter, claim in report.CLAIMS.items():
        assert f"<b>{letter}, {claim.name}.</b> {html.escape(claim.words)}" in page and f"({claim.where})" in page
    assert set(re.findall(r"\bC\d\b", without_scripts(page))) == set(report.CLAIMS)


def test_the_page_needs_no_network():
    _, page = made_page(command="gp-spectral study")
    words = without_scripts(page)  # Vega names its schemas by addresses; see test_page
    assert "://" not in words and "href" not in words and "<script" not in words and "<link" not in words
    assert words.count("<table") == words.count("</table>") == 9  # a claim each, what turned most, success


def test_a_name_that_nobody_gives_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="preset"):
        report.TEMPLATES.get_template("report.html.j2").render()


def test_five_sentences_say_what_the_rows_say():
    "In a world as the paper says, in its contrary, and where RL had no signal; what is undecided is called so."
    of = lambda tables: report.sentences(tables, claims(tables, 20, 0.2), 20, 0.2)
    sft, rl, repair, which, spectra = of(with_twins(dict(constant=0.2), made_up(PAPER, EDITS)))
    assert "from 30 to 20 % under the other rule" in sft or "% under the other rule: -" in sft
    assert "more than half of what SFT had taken" in rl and "RL on a constant reward 2" in rl
    assert (
        "more than plain interpolation that keeps" in repair
        and "reproduced: the peak (C1), RL heals (C2), the start matters (C3), directions" in which
    )
    assert "times as far as noise" in spectra and "most of all" in spectra
    worse = EDITS | {"anchored 20%": (0.2, 0.45)}
    _, rl, repair, which, _ = of(made_up(CONTRARY, worse))
    assert (
        "less than half" in rl
        and "gives back more" in repair
        and "not reproduced: the peak (C1), RL heals (C2), the start" in which
    )
    shut = with_twins({}, made_up(PAPER, EDITS))
    closed = shut["gate"].assign(success=0.01)
    assert of(shut | dict(gate=closed))[1].startswith("RL had no signal: from step 20: 1 % of the first round")
    told = " ".join(of(made_up(PAPER, EDITS, seeds=1)))
    assert "no interval with one seed" in told and "is undecided" in told and "nan" not in told


def test_a_rise_below_the_margin_is_none():
    "Equivalence by the same interval: no rise of three points or more; a small one that is there stays one."
    row = lambda *x, **k: report._row("C", "t", (*x, 6), **k)
    assert row(0.0, -0.02, 0.02)["verdict"] == "not reproduced" and row(0.0, -0.04, 0.04)["verdict"] == "undecided"
    assert "by less than 3 points" in row(0.0, -0.02, 0.02)["note"] and row(0.0, -0.02, 0.02)["p"] < 0.05
    assert (
        row(0.02, 0.01, 0.029)["verdict"] == "reproduced" and row(0.0, -0.02, 0.02, margin=0)["verdict"] == "undecided"
    )
    assert row(0.0, -0.02, 0.02, side="<")["verdict"] == "not reproduced"
    assert row(0.0, -0.02, 0.02, unit="ratio")["verdict"] == "undecided"  # the margin is one of success


def test_statistics_by_scipy():
    "Student's interval and test are scipy's; Holm's adjustment is that of its paper."
    x = np.random.default_rng(4).normal(0.3, 1, 6)
    for level in (0.9, 0.95):
        low, high = stats.ttest_1samp(x, 0).confidence_interval(level)
        assert report.interval(x, level) == pytest.approx((x.mean(), low, high, 6))
    assert report.p_value(report.interval(x), 0.1) == pytest.approx(stats.ttest_1samp(x, 0.1).pvalue)
    assert report.interval([0.2])[1:3] == (-np.inf, np.inf)
    # Holm (1979): the smallest of m counts m times, the next m - 1 times, and none less than one before it
    assert report.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_two_ways_by_hand():
    "A number per seed and hand: the variance of its mean is that of seeds, and of hands, less that of cells."
    x = np.random.default_rng(5).normal(size=(4, 3)) + np.arange(4)[:, None] + 3 * np.arange(3)
    rows = pd.DataFrame(dict(seed=np.repeat(range(4), 3), hand=np.tile(list("abc"), 4), x=x.ravel()))
    part = lambda means, n: ((means - x.mean()) ** 2).sum() / (n * (n - 1))
    expected = part(x.mean(1), 4) + part(x.mean(0), 3) - part(x.ravel(), 12)
    mean, V, n = report.two_way(rows, ["x"])
    assert n == 4 and mean[0] == pytest.approx(x.mean()) and V[0, 0] == pytest.approx(expected)


def test_a_ratio_by_simulation():
    "Fieller's interval covers the ratio in 95 % of studies, whose two numbers go together; it has no bounds near zero."
    rng, inside = np.random.default_rng(6), 0
    V = np.array([[0.04, 0.03], [0.03, 0.04]])
    for _ in range(1000):
        sample = rng.multivariate_normal([0.5, 1.0], V, 12)
        _, low, high, _ = report.fieller(sample.mean(0), np.cov(sample.T) / 12, 12)
        inside += low <= 0.5 <= high
    assert 0.93 < inside / 1000 < 0.97  # standard error .7 points
    assert report.fieller(np.array([0.5, 0.01]), V, 12)[1:3] == (-np.inf, np.inf)


def test_what_could_have_been_decided_is_decided_that_often():
    "Normal data, six seeds: an effect of `detectable` size is decided in 75 to 85 % of 2,000 studies."
    rng = np.random.default_rng(3)
    sizes = [report.detectable(report.interval(rng.normal(size=6))) for _ in range(2000)]
    effect = float(np.mean(sizes))  # studies differ in what they see; the mean of them is what is planned with
    found = np.mean([verdict(*report.interval(effect + rng.normal(size=6))[1:3]) == "reproduced" for _ in range(2000)])
    assert 0.75 < found < 0.85
    assert report.detectable((0.1, -np.inf, np.inf, 1)) == np.inf
