"""The page that shows how a drawing, a caption or an answer came about: its numbers, its file, its server."""

import base64
import dataclasses
import io
import json
import os
import re
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from test_sample import picture, run        # noqa: F401, a fixture

SCALE, WARM = 3.0, 0.8
EVIL = 'a <script>alert(1)</script> "red" </script> <!-- \u0645\u0631\u062d\u0628\u0627 \u202e star'


def guided(run, grid=None):         # noqa: F811
    return dataclasses.replace(run, grid=grid or run.grid,
                               sampling=sample.Sampling(guidance=SCALE, temperature=WARM, seed=5))


def open_url(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def in_page(page):
    """The data in a page, found as a browser does: up to the next end of a script."""
    return json.loads(re.search(rb'<script type="application/json" id="data">(.*?)</script', page, re.DOTALL)[1])


@torch.no_grad()
def test_the_numbers_of_a_drawing_are_those_of_each_step_computed_alone(run):       # noqa: F811
    """A page that explains another picture than the one drawn, or arithmetic that does not add up."""
    run, prompt = guided(run), "a red circle"
    found = in_page(sample.page(sample.explain_drawing(run, prompt)))
    drawn = sample.text_to_image(run, [prompt])[0]
    for url in (found["frames"][-1], dict(map(tuple, found["scales"]))[SCALE]):     # another batch may round
        assert np.abs(np.asarray(open_url(url), int) - np.asarray(drawn)).max() <= 1
    first, past_last = run.vocab.image_rows

    def alone(text, so_far):
        ids = data.render_t2i(run.vocab, run.tokenizer, text)[0] + so_far
        return run.model(torch.tensor([ids]))[0, -1, first:past_last].double()
    so_far, softmax = [], lambda z: (z / WARM).softmax(0)
    for i, (chosen, code) in enumerate(found["ids"]):
        c, u = alone(prompt, so_far), alone(None, so_far)
        shown = [code for _, code in found["shown"][i]]
        assert code in shown and len(set(shown)) == sample.SHOWN
        assert set((u + SCALE * (c - u)).topk(sample.SHOWN - 1).indices.tolist()) <= set(shown)
        for k, z in enumerate((u, c, u + SCALE * (c - u))):
            assert found["logits"][i][k] == pytest.approx(z[shown].tolist(), abs=2e-4)
            assert found["p"][i][k] == pytest.approx(softmax(z)[shown].tolist(), abs=2e-4)
            assert sum(found["p"][i][k]) + found["others"][i][k] == pytest.approx(1, abs=1e-3)
        for j, text in enumerate(("red circle", "a circle", "a red")):
            moved = (softmax(alone(text, so_far)) - softmax(c)).abs().sum() / 2
            assert found["moved"][j][i] == pytest.approx(float(moved), abs=2e-4)
        # The candidate that was chosen looks as the finished picture does in its place.
        at = [8 * (i % 2), 8 * (i // 2), 8 * (i % 2) + 8, 8 * (i // 2) + 8]
        patch = np.asarray(open_url(found["patches"][i][shown.index(code)]), int)
        assert np.abs(patch - np.asarray(drawn.crop(at))).max() <= 1
        so_far.append(chosen)
    assert [text for _, text in found["prompt"]][0] == "bos" and found["prompt"][-1][1] == "<boi>"


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), pytest.param((17, 16), marks=pytest.mark.slow)])
def test_a_picture_so_far_knows_no_code_that_is_still_to_come(run, grid):       # noqa: F811
    """Frames that show the future, or cells of the picture that come in another order than the codes."""
    run = guided(run, grid)
    found = sample.explain_drawing(run, "a red circle")
    frames = [np.asarray(open_url(url), int) for url in found["frames"]]
    (h, w), exact = grid, len(found["ids"]) <= 64
    assert len(frames) == (h * w if exact else h)       # a large grid comes row by row
    codes = torch.tensor([code for _, code in found["ids"]])
    for i, frame in zip(range(h * w) if exact else range(w - 1, h * w, w), frames, strict=True):
        assert frame.shape == (8 * h, 8 * w, 3)
        guess = codes[:i + 1].tolist()
        while len(guess) < h * w:
            guess.append(guess[-w] if len(guess) >= w else guess[i])
        wanted = np.array(data.to_image(run.vqgan.decode(torch.tensor(guess).view(1, h, w))), int)
        for k in range(i + 1, h * w):
            wanted[k // w * 8:k // w * 8 + 8, k % w * 8:k % w * 8 + 8] = 255
        difference = frame - wanted
        cells = np.abs(difference.reshape(h, 8, w, 8, 3).mean((1, 3, 4)))           # keep their color when compressed
        assert np.abs(difference).max() <= 1 if exact else cells.max() < 8


def test_the_words_of_a_picture_are_those_of_the_other_commands(run):       # noqa: F811
    """A page that tells of another caption or answer than the command line prints."""
    image, greedy = picture(40), sample.Sampling(temperature=0.0)
    for question, task in ((None, sample.caption), ("how many?", lambda *x: sample.answer(x[0], x[1], ["how many?"], *x[2:]))):
        found = in_page(sample.page(sample.explain_words(run, image, question or "", greedy, 9)))
        ids = [i for i, _ in found["ids"]]
        said = run.tokenizer.decode([i for i in ids if i != run.vocab.eos])
        assert (said.strip() if question else said) == task(run, [image], greedy, 9)[0]
        assert all(p.index(max(p)) == row.index(token) for row, token, (p,) in zip(
            found["shown"], found["ids"], found["p"]))
        assert [sum(p) + rest for (p,), (rest,) in zip(found["p"], found["others"])] == pytest.approx([1] * len(ids), abs=1e-3)
        codes = sample.encode(run, [image])[0].flatten().tolist()
        assert [x for _, x in found["prompt"] if isinstance(x, int)] == codes
        ending = dataclasses.replace(run, vocab=dataclasses.replace(run.vocab, eos=ids[2]))     # shown, too
        again = sample.explain_words(ending, image, question or "", greedy, 9)["ids"]
        assert [i for i, _ in again] == ids[:ids.index(ids[2]) + 1]


def test_no_words_end_the_script_of_the_page(run):      # noqa: F811
    """A prompt that runs in the browser of whoever opens the page."""
    plain, evil = (sample.page(sample.explain_drawing(run, words)) for words in ("a", EVIL))
    for mark in (b"<script", b"</script", b"<!--"):
        assert plain.count(mark) == evil.count(mark) == sample.PAGE.read_bytes().count(mark)
    assert in_page(evil)["words"] == EVIL.split()
    assert b"innerHTML" not in evil and sample.PAGE.read_text().count("PAGE_DATA") == 1
    assert not re.search(rb"https?://", evil)           # nothing to fetch


def test_the_command_writes_one_file_of_moderate_size(run, tmp_path, monkeypatch, capsys):      # noqa: F811
    """A page too large to send, words that are drawn where a picture was meant, or a missing file's traceback."""
    out, red = tmp_path / "x.html", tmp_path / "red.png"
    picture().save(red)
    for side, parts in ((16, ["a", "red circle"]), (2, [str(red)]), (2, [str(red), "how", "many?"]), (2, ["x" * 500])):
        monkeypatch.setattr(sample, "load", lambda *_: dataclasses.replace(run, grid=(side, side)))
        sample.main(["page", *parts, "--out", str(out), "--n", "5"])
        assert capsys.readouterr().out == f"{out}\n" and out.stat().st_size < 5e6
    for parts in (["nowhere.PNG"], [str(red), str(red)]):
        with pytest.raises(SystemExit, match="perhaps with a question"):
            sample.main(["page", *parts, "--out", str(out)])
    monkeypatch.setattr(sample, "PAGE", tmp_path / "assets" / "page.html")
    with pytest.raises(SystemExit, match="page.html: no such file; .* needs a clone"):
        sample.main(["page", str(red), "--out", str(out), "--n", "5"])


@pytest.fixture
def served(run):        # noqa: F811
    def explain(words):
        if words == "broken":
            raise RuntimeError("first\nsecond")
        return sample.explain_drawing(run, words)
    with sample.server(explain, "a circle", 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.05,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def test_a_server_explains_the_words_of_its_field_and_refuses_in_a_sentence(served):
    """A field that changes nothing, a prompt that takes all memory, or a traceback in the browser."""
    def get(query=""):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{served.server_port}/{query}", timeout=60) as answer:
                return answer.status, in_page(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, in_page(error.read())
    assert served.server_address[0] == "127.0.0.1"
    for port in (served.server_port, 70_000):
        with pytest.raises(ValueError, match=f"--serve {port}: "):
            sample.server(None, "", port)
    assert [get(query)[1]["words"] for query in ("", "?words=a+red", "?words=")] == [
        ["a", "circle"], ["a", "red"], []]
    assert get("?words=" + urllib.parse.quote(EVIL))[1]["asked"] == EVIL
    for words, error in (("x" * 301, "301 letters are too many: at most 300 fit here"), ("broken", "first second")):
        status, found = get("?words=" + words)
        assert (status, found) == (400, {"error": error, "asked": words, "letters": 300})


# -----------------------------------------------------------------------------------------------------------
# In a browser

@pytest.fixture(scope="module")
def browser():
    """Playwright's Chromium, or the one that $CHROMIUM names, or that of the system."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright && playwright install chromium")
    names = ("chromium", "chromium-browser", "google-chrome")
    own = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as p:
        try:
            chromium = p.chromium.launch(executable_path=own, args=["--no-sandbox", "--headless=shell"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


def numbers(tab, selector):
    """Rows of the numbers in these cells, three to a row."""
    found = [float(text.replace("\u2212", "-").rstrip("%")) for text in tab.locator(selector).all_inner_texts()]
    return np.array(found).reshape(-1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["a red circle", EVIL])
def test_a_browser_shows_every_step(run, browser, tmp_path, prompt):        # noqa: F811
    """A script that fails, numbers that do not add up on the screen, or panels that lie on each other."""
    file, shot, errors = tmp_path / "page.html", tmp_path / "shot.png", []
    file.write_bytes(sample.page(sample.explain_drawing(guided(run, (3, 4)), prompt)))
    tab = browser.new_page()
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or errors.append(request.url))
    tab.on("dialog", lambda dialog: errors.append(dialog.message))
    tab.goto(file.as_uri())
    assert " ".join(prompt.split()) in tab.inner_text("#title")
    for step in range(12):
        tab.locator("#slider").fill(str(step))
        assert tab.inner_text("#where").startswith(f"code {step + 1} of 12, row {1 + step // 4} column {1 + step % 4}")
        assert tab.locator("#cells .later").count() == 11 - step
        assert f"{step + 1} of 12" in tab.get_attribute("#picture img", "alt")
        assert numbers(tab, "#candidates .p").sum(0) == pytest.approx([100] * 3, abs=0.5)
        u, c, g = numbers(tab, "#candidates .logit").T
        assert len(g) == sample.SHOWN and g == pytest.approx(u + SCALE * (c - u), abs=0.04)
        assert tab.locator("#candidates .chosen").count() == 1
        assert tab.locator("#moved li").count() == len(prompt.split())
    tab.click("h1")
    tab.keyboard.press("ArrowLeft")
    assert tab.inner_text("#where").startswith("code 11 of 12")
    tab.locator("#cells button").nth(2).click()
    tab.click("#play")
    tab.wait_for_function("() => document.querySelector('#where').textContent.startsWith('code 12') && "
                          "document.querySelector('#play').textContent === 'Play'", timeout=20_000)
    for width in (400, 900, 1280, 1900):
        tab.set_viewport_size({"width": width, "height": 800})
        boxes = [each.bounding_box() for each in tab.locator("#panels > section").all()]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart = [abs(2 * (a[x] - b[x]) + a[side] - b[side]) >= a[side] + b[side]
                         for x, side in (("x", "width"), ("y", "height"))]
                assert any(apart)
        tab.screenshot(path=shot, full_page=True)
        with Image.open(shot) as image:
            assert image.width == width and len(image.convert("L").getcolors()) > 50       # not blank
    assert tab.locator("img:not([alt]), button:not([aria-label]):empty").count() == 0
    assert errors == []
    tab.close()


@pytest.mark.slow
def test_a_browser_asks_the_server(served, browser):
    """A field that sends nothing, or a second tab that waits for the first one's connection."""
    tab = browser.new_page()
    tab.goto(f"http://127.0.0.1:{served.server_port}/")
    for words in ("a red", 'a "red" <b>circle</b>'):
        tab.fill("#words", words)
        tab.click("#go")
        tab.wait_for_function("words => document.querySelector('#title')?.textContent.includes(words)", arg=words)
    tab.goto(f"http://127.0.0.1:{served.server_port}/?words={'x' * 301}")
    assert "301 letters" in tab.inner_text("#error") and not tab.is_visible("#main")
    tab.close()


@pytest.mark.slow
def test_a_browser_shows_an_answer_word_by_word(run, browser, tmp_path):        # noqa: F811
    """The other half of the page, which has no guidance and no frames."""
    file, errors = tmp_path / "page.html", []
    file.write_bytes(sample.page(sample.explain_words(run, picture(), "how many?", sample.GREEDY, 9)))
    tab = browser.new_page(viewport={"width": 400, "height": 800})
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(file.as_uri())
    steps = int(tab.get_attribute("#slider", "max")) + 1
    for step in range(steps):
        shown = [float(text.rstrip("%")) for text in tab.locator("#candidates .p").all_inner_texts()]
        assert len(shown) == sample.SHOWN + 1 and sum(shown) == pytest.approx(100, abs=0.5)
        tab.keyboard.press("ArrowRight")
    assert errors == [] and tab.evaluate("document.documentElement.scrollWidth") <= 400
    tab.close()
