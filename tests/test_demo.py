"""The local page: its search, its messages, the pixels of scripts/sample.py; and the whole of it in a browser."""

import importlib.util
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, free_port, run
from forked import run_forked
from PIL import Image

from libs.model import Model, imagenet_names
from scripts import demo, sample

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LACKING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
needs_gradio = pytest.mark.skipif(
    "gradio" in LACKING, reason="no gradio: python -m pip install -r scripts/demo_requirements.txt"
)


@pytest.fixture
def model(weights):
    return Model.open(weights)


def test_search_of_imagenet():
    names = imagenet_names()
    assert names[0] == "tench" and names[999] == "toilet tissue" and len(set(names)) == 1000
    assert demo.offered("207", names) == [207]
    assert demo.offered("20", names)[:3] == [20, 200, 201]  # the number itself, then those that begin with it
    assert demo.offered(" Golden RETRIEVER ", names) == [207]
    retrievers = [names[label] for label in demo.offered("retriever", names)]
    assert len(retrievers) == 5 and all("retriever" in name for name in retrievers)
    assert names[demo.offered("goldfihs", names)[0]] == "goldfish"
    assert demo.offered("crane", names) == [517, 134]  # the name itself, then "crane bird"
    assert demo.caption(134, names) == "crane bird (134)" and demo.caption(1000, names) == "no class (1000)"
    assert demo.offered("1000", names) == demo.offered("no class", names)[:1] == [1000]
    assert demo.offered("", names) == list(range(demo.MOST_OFFERED)) and demo.offered("qqqq", names) == []


def test_search_of_digits():
    names = [str(label) for label in range(10)]
    assert demo.offered("", names) == list(range(11))
    assert [demo.offered(str(i), names)[0] for i in range(10)] == list(range(10))
    assert demo.offered("22", names) == []  # a number is not misspelt
    assert demo.caption(3, names) == "3"


def test_what_is_marked_counts_if_the_search_offers_it():
    names = imagenet_names()
    assert demo.chosen("crane", 517, names) == 517
    assert demo.chosen("golden retriever", 517, names) == 207  # drawn before the page has offered the new search's
    assert demo.chosen("no class", None, names) == 1000


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"word": "dog"}, "no class is called 'dog'"),
        ({"word": "7"}, r"class labels are 0..3 \(3: no class\); found 7"),
        *(
            ({"seed": seed}, f"the seed must be a whole number from 0 to .*; found {found}")
            for seed, found in ((None, "nothing"), ("one", "'one'"), (-1, "-1"), (0.5, "0.5"))
        ),
        ({"scale": 0.5}, "the guidance scale must be at least 1 .*; found 0.5"),
        ({"scale": None}, "the guidance scale must be a number"),
        ({"scale": float("nan")}, "the guidance scale must be at least 1 .*; found nan"),
        ({"steps": 1}, "config.sample.sample_steps must be at least 3 for dpm_solver; found 1"),
        ({"steps": 2.5}, "the number of steps must be a whole number from 1 to 1000; found 2.5"),
        ({"n_samples": 65}, "the number of samples must be a whole number from 1 to 64; found 65"),
    ],
)
def test_bad_fields_are_told_in_one_line(model, changed, message):
    fields = {"word": "1", "marked": 1, "seed": 0, "scale": 2, "steps": 3, "n_samples": 2}
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        demo.checked(model, **fields | changed)
    assert "\n" not in str(caught.value)


def test_a_mistake_of_the_user_is_told_in_the_page(monkeypatch, model):
    """As gradio's error, whose class alone is needed here."""

    class Error(Exception):
        def __init__(self, message, print_exception):
            super().__init__(message)

    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(Error=Error))
    with pytest.raises(Error, match="no class is called 'a&lt;b'"), demo.errors_in_page():
        demo.checked(model, "a<b", None, 0, 2, 3, 2)
    with pytest.raises(ValueError, match="invalid literal"), demo.errors_in_page():
        int("x")


def test_the_pictures_are_those_of_the_sampling_program(model, weights, tmp_path):
    sampled, labels = demo.checked(model, "2", 2, seed=3, scale=2.5, steps=5, n_samples=6)
    pictures = sample.draw_samples(sampled, labels)
    assert pictures.shape == (6, 16, 16, 3) and len(np.unique(pictures.reshape(6, -1), axis=0)) == 6
    flags = ("--classes", 2, "--per_class", 6, "--seed", 3, "--cfg", 2.5, "--steps", 5, "--trajectory")
    done = run_forked("scripts/sample.py", *flags, "--nnet_path", weights, "--grid", tmp_path / "grid.png")
    assert done.returncode == 0, done.stderr
    grid = np.asarray(Image.open(tmp_path / "grid.png"))[-100:-4]  # cells of 96 and 4 pixels between
    for i in range(6):
        left = grid.shape[1] - (6 - i) * 100
        assert np.array_equal(grid[::6, left : left + 96 : 6], pictures[i])
    sheet = np.asarray(Image.open(tmp_path / "grid_trajectory.png"))
    assert np.array_equal(np.asarray(sample.trajectory_sheet(sampled, labels[:1], [0])), sheet)


def test_without_gradio_one_line_says_what_to_install():
    hidden = "import sys; sys.modules['gradio'] = None; from scripts import demo; demo.main()"
    done = run("-c", hidden, "--autoencoder", "none.pth")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "pip install -r scripts/demo_requirements.txt" in done.stderr


@needs_gradio
def test_errors_of_the_program_are_one_line(weights):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags, message in (
            (("--nnet_path", "none.safetensors"), "error: no checkpoint at none.safetensors"),
            (("--nnet_path", weights, "--port", port), f"error: port {port} is in use"),
        ):
            done = run("scripts/demo.py", *flags)
            assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
            assert message in done.stderr


# --- In a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def address(weights, tmp_path):
    """Of the page, served by the program in a process of its own."""
    command = [sys.executable, "scripts/demo.py", "--nnet_path", weights, "--port", str(free_port())]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    with open(tmp_path / "errors.txt", "w") as errors:
        server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
    line = server.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), Path(errors.name).read_text()
    yield line.split()[0]
    server.send_signal(signal.SIGINT)
    server.wait(60)
    assert "Traceback" not in Path(errors.name).read_text()


@pytest.fixture
def browser_page():
    """An empty page of headless Chromium."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=flags)
        yield browser.new_page(viewport={"width": 1280, "height": 1000})
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)} (see CONTRIBUTING.md)")
def test_a_class_is_searched_and_sampled_in_a_browser(model, address, browser_page):
    page, asked = browser_page, []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)

    def shown(image) -> np.ndarray:
        """The pixels of a picture in the page."""
        image.wait_for()
        with Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body())) as file:
            return np.asarray(file.convert("RGB"))

    page.locator("#classes label").nth(3).wait_for()  # three classes, and none
    page.get_by_label("Search a class").fill("2")
    page.wait_for_function("document.querySelectorAll('#classes label').length == 1")
    page.get_by_role("button", name="Sample", exact=True).click()
    samples = page.locator("#samples img")
    samples.nth(7).wait_for()
    sampled, labels = demo.checked(model, "2", 2, model.config.seed, model.config.sample.scale, 4, 8)
    expected = sample.draw_samples(sampled, labels)
    for i in range(8):
        assert np.array_equal(shown(samples.nth(i)), expected[i])
    sheet = page.locator("#sheet img")
    assert np.array_equal(shown(sheet), np.asarray(sample.trajectory_sheet(sampled, labels[:1], [0])))

    samples.nth(5).click()
    page.get_by_text("How sample 6 comes about").wait_for()
    assert np.array_equal(shown(sheet), np.asarray(sample.trajectory_sheet(sampled, labels[:1], [5])))

    page.get_by_label("Seed").fill("")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("the seed must be a whole number").first.wait_for()
    page.get_by_label("Search a class").fill("dog")
    page.get_by_text("No such class").wait_for()
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("no class is called 'dog'").first.wait_for()

    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1], "the page is wider than its window"
    away = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert asked and not away
