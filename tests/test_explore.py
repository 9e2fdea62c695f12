"The explorer in a real browser: JupyterLab, Chromium, a slider that is moved."

import nbformat
from gp_spectral.study import study


def test_slider_draws_a_new_picture(lab, tmp_path_factory):
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    folder = tmp_path_factory.mktemp("explored")
    study(
        "tiny",
        seeds=1,
        out=folder,
        progress=False,
        overrides=dict(
            test_problems="16",
            retry_problems="4",
            sampled_problems="4",
            twins="",
            curve_problems="8",
            sft_steps="4",
            sft_points="1",
            sft_examples="32",
            ppo_iterations="1",
            ppo_samples="8",
            ppo_minibatch="8",
            tops="0.2",
            recovery_problems="8",
            test_attempts="1",
        ),
    )
    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(f"from gp_spectral.explore import explore\nexplore({str(folder / 'tiny')!r})")
        ],
        metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
    )
    nbformat.write(nb, folder / "explorer.ipynb")
    page = lab(folder / "explorer.ipynb")
    wait = WebDriverWait(page, 180, ignored_exceptions=(Exception,))
    picture = lambda: page.find_element(By.CSS_SELECTOR, ".jp-OutputArea img").get_attribute("src")
    first = wait.until(lambda b: picture())
    handle = page.find_element(By.CSS_SELECTOR, ".noUi-handle")
    handle.send_keys(Keys.ARROW_RIGHT)
    wait.until(lambda b: "layer 1" in b.find_element(By.TAG_NAME, "body").text)
    assert wait.until(lambda b: picture() != first)
