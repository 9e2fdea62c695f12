"Options and fixtures that all tests share."

import atexit
import gc
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import pytest

for key, value in dict(
    TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE", OPENBLAS_THREAD_TIMEOUT="4"
).items():
    os.environ.setdefault(key, value)

if "GP_SPECTRAL_CACHE" not in os.environ:  # factors of throw-away matrices do not belong into the user's cache
    os.environ["GP_SPECTRAL_CACHE"] = tempfile.mkdtemp(prefix="gp_spectral_factors_")
    atexit.register(shutil.rmtree, os.environ["GP_SPECTRAL_CACHE"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="also run the slow tests, and the notebooks' cells flagged slow or widget"
    )


def pytest_configure(config):
    several = hasattr(config, "workerinput") or config.getoption(
        "numprocesses", None
    )  # workers inherit from the process that starts them
    for name in ("OMP", "MKL", "OPENBLAS"):
        os.environ.setdefault(
            f"{name}_NUM_THREADS", "1" if several else "2"
        )  # two cores are what the tests are written for
    config.addinivalue_line("markers", "slow: takes minutes; runs only with --slow")


def pytest_collection_finish():
    "What has been imported stays: a collection of garbage, which trainings ask for, need not go through it each time."
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def browser():
    "A headless Chromium driven by selenium; skips the test where there is none."
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, driver = (
        next((p for p in map(shutil.which, names) if p), None)
        for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
    )
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1400,1200"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with selenium.Chrome(options=options, service=selenium.ChromeService(driver)) as chrome:
        yield chrome


# JupyterLab asks which kernel to use when it is told to run cells before its session is connected, whatever its
# indicator says.
RUN_ALL = """
const [seconds, done] = arguments, app = window.jupyterapp, end = Date.now() + 1000 * seconds;
const page = () => app.shell.currentWidget, kernel = () => page()?.sessionContext?.session?.kernel;
const run = () => app.commands.execute('notebook:run-all-cells').then(() => done('run'), e => done('not run: ' + e));
const look = () => {
  const connected = kernel()?.connectionStatus == 'connected' && kernel()?.status == 'idle';
  if (page()?.sessionContext?.isReady && connected && page()?.context?.isReady) run();
  else if (Date.now() > end) done(`the kernel is ${kernel()?.status}, ${kernel()?.connectionStatus}`);
  else setTimeout(look, 200);
};
look();
"""


@pytest.fixture
def lab(browser, tmp_path):
    """`lab(notebook)` opens a copy of a notebook in JupyterLab, runs all its cells and gives the browser, its
    widgets ready to be used."""
    pytest.importorskip("jupyterlab")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        k: v for k, v in os.environ.items() if k != "MPLBACKEND"
    }  # which our commands, called by other tests, have set: kernels draw inline
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                "--ServerApp.token=test",
                f"--ServerApp.port={port}",
                f"--ServerApp.root_dir={tmp_path}",
                "--LabApp.expose_app_in_browser=True",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
        )

    def opened(notebook, seconds=180):  # a kernel that imports torch on two busy cores takes its time
        shutil.copy(notebook, tmp_path)
        end = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=test", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > end or server.poll() is not None:
                    pytest.fail((tmp_path / "lab.log").read_text()[-3000:])
                time.sleep(0.3)
        browser.get(f"http://127.0.0.1:{port}/doc/tree/{os.path.basename(notebook)}?token=test")
        wait = WebDriverWait(
            browser, seconds, ignored_exceptions=(Exception,)
        )  # elements come and go while the page is built
        wait.until(lambda b: b.find_element(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell"))
        browser.set_script_timeout(seconds)
        said = browser.execute_async_script(RUN_ALL, seconds)
        assert said == "run", f"{said}; {(tmp_path / 'lab.log').read_text()[-2000:]}"
        return browser

    yield opened
    browser.get("about:blank")
    server.terminate()  # JupyterLab takes its time to stop its kernels
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
