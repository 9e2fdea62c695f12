"""How long does a move in the explorer take, from the click to the new pictures, beside drawing the same?

    gp-spectral study                                  # once: a run folder with its checkpoints, runs/tiny-rule
    python benchmarks/explore.py runs/tiny-rule        # needs Chromium and its driver, and the extra [app]

The app is started as `gp-spectral explore` starts it. In the browser a clock runs from the click on a square of the
map to the change of the pictures below it: the way to the kernel and back, the decompositions of a matrix that is
looked at for the first time, the drawing. Each matrix is visited twice. Beside it stands what a kernel needs only to
draw the singular values and the angles of a matrix with Matplotlib into a picture: a new figure each time, the factors
known, no browser and no way to one. That is the least that the explorer before this one took for a move; it drew four
panels. Ratios are of medians.
"""

import argparse
import io
import shutil
import time

import matplotlib

from common import ratios, spread, table, write

matplotlib.use("Agg")

CLICK = """
const [name, done] = arguments, pictures = () => document.querySelectorAll('.vega-embed svg')[1].innerHTML;
const squares = [...document.querySelectorAll('.mark-rect path')];
const square = squares.find(p => p.getAttribute('aria-label')?.includes(name));
const at = square.getBoundingClientRect(), how = {bubbles: true, clientX: at.x + 4, clientY: at.y + 4, view: window};
const before = pictures(), begun = performance.now();
const seen = new MutationObserver(() => {
  if (pictures() != before) { seen.disconnect(); done(performance.now() - begun) }
});
seen.observe(document.body, {subtree: true, childList: true, attributes: true});
for (const kind of ['pointerover', 'pointerdown', 'pointerup', 'mouseover', 'mousedown', 'mouseup', 'click'])
  square.dispatchEvent(new (kind.startsWith('p') ? PointerEvent : MouseEvent)(kind, how));
"""
READY = "return document.querySelectorAll('.mark-rect path').length > 5 && "
READY += "document.querySelectorAll('.vega-embed svg')[1]?.innerHTML.length > 5000"


def chromium():
    "A headless Chromium."
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1400,1200"):
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def moves(folder, matrices):
    "Milliseconds of a first and of a second visit to each matrix."
    from selenium.webdriver.support.ui import WebDriverWait

    from gp_spectral.app import serving

    with serving([folder]) as (address, _), chromium() as browser:
        browser.set_script_timeout(60)
        browser.get(address)
        WebDriverWait(browser, 120).until(lambda b: b.execute_script(READY))
        time.sleep(2)
        for _ in range(2):
            visit = []
            for name in matrices:
                visit.append(browser.execute_async_script(CLICK, name))
                time.sleep(0.3)
            yield visit


def drawn(opened, matrices):
    "Milliseconds of drawing singular values and angles with Matplotlib, with everything known."
    import matplotlib.pyplot as plt

    from gp_spectral.angles import plot_profile
    from gp_spectral.explore import live_profile, live_spectrum
    from gp_spectral.svd import plot_spectrum

    base, other = opened.pairs[0]
    for name in matrices:
        rows = live_profile(opened, base, other, name)
        rows = rows[rows.what == "measured"].assign(angle=rows.degrees / 57.3, random=1.2, forced=False, matrix=name)
        spectrum = live_spectrum(opened, name)
        begun = time.perf_counter()
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        plot_spectrum(spectrum, name, ax=axes[0])
        plot_profile(rows.reset_index(drop=True), ax=axes[1])
        figure.savefig(io.BytesIO(), format="png")
        plt.close(figure)
        yield 1000 * (time.perf_counter() - begun)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the run folder of a study")
    parser.add_argument("--matrices", type=int, default=12, help="how many are clicked on")
    args = parser.parse_args()
    from gp_spectral.explore import opened
    from gp_spectral.page import furthest, map_rows

    one = opened(args.folder)  # it begins with the matrix that turned furthest: a click on that changes nothing
    shown = furthest(map_rows(one.tables.angles))
    matrices = [n for n in dict.fromkeys(one.tables.angles.matrix) if n != shown][: args.matrices]
    first, again = moves(args.folder, matrices)
    plain = list(drawn(one, matrices))
    rows = [
        ("from the click to the new pictures, a matrix seen for the first time", spread(first), ratios(first, plain)),
        ("the same, a matrix seen before", spread(again), ratios(again, plain)),
        ("two of the four pictures by Matplotlib, in the kernel alone", spread(plain), "1"),
    ]
    words = f"Milliseconds; {len(matrices)} matrices, medians with the least and the most; ratios matrix by matrix."
    raw = dict(milliseconds=dict(first=first, again=again, matplotlib=plain))
    text = table(("", "milliseconds", "by Matplotlib's"), rows)
    write("A move in the explorer", text, words, raw, ("altair", "matplotlib", "voila"))


if __name__ == "__main__":
    main()
