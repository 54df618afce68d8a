"""Tables, fits and plots of runs, from small files that stand for them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import data
import sample
import study
from test_sample import run  # noqa: F401


def finished(folder, width, seed, loss, score, **flags):
    """What compare reads of a run whose loss halves from step 50 to 100."""
    folder.mkdir()
    config = dict(hidden_size=width, seed=seed, out=str(folder), rows=2, context=8, **flags)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"model.layers.0.mlp.up_proj.weight": torch.zeros(width, width),
               "model.embed_tokens.weight": torch.zeros(50, width),
               "model.embed_tokens.image_rows.weight": torch.zeros(4, width)}
    torch.save({"format": sample.FORMAT, "model": weights}, folder / "model.pt")
    lines = [dict(act=3, step=50, val_t2i=2 * loss), dict(act=3, step=60, loss=1.0, t2i=1.0),
             dict(act=3, step=100, val_t2i=loss),
             dict(act=4, step=0, scores=dict(n=2, t2i_exact=score, vqa=None))]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_compare_groups_runs_by_what_differs_but_the_seed(tmp_path, capsys):
    """Seeds that count as settings, a mean over what differs, a law fitted to the wrong axis."""
    runs = [finished(tmp_path / f"{w}-{s}", w, s, 16.0 * w ** -0.5 * noise, w / 100)
            for w in (4, 16, 64, 256) for s, noise in ((0, 0.9), (1, 1.1))]
    study.main(["compare", *runs, "--show", "val_t2i,t2i_exact", "--save", str(tmp_path / "runs.json")])
    printed = capsys.readouterr().out
    study.main(["compare", str(tmp_path / "runs.json"), "--show", "val_t2i,t2i_exact"])
    assert capsys.readouterr().out == printed
    lines = printed.splitlines()
    assert lines[0] == "| hidden_size | parameters | seeds | val_t2i | t2i_exact |"
    assert lines[2] == "| 4 | 16 | 2 | 8.000 ± 1.131 | 0.040 ± 0.000 |"
    assert lines[6].startswith("val_t2i ~ FLOPs^-0.250 at the end")     # width^2 parameters, equal steps
    kept = json.loads((tmp_path / "runs.json").read_text())[0]
    assert kept["config"] == {"hidden_size": 4, "seed": 0}
    assert [flops for flops, _ in kept["curve"]] == [6 * 16 * 16 * step for step in (50, 100)]


def test_compare_sees_flags_that_an_older_run_lacks(tmp_path, capsys):
    """Two settings taken for one, as the flag between them is younger than the first run."""
    old = finished(tmp_path / "old", 4, 0, 1.0, 0.5)
    new = finished(tmp_path / "new", 4, 0, 1.0, 0.7, code_noise=0.4)
    study.main(["compare", old, new, "--show", "t2i_exact"])
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == "| code_noise" and rows[2:4] == ["| 0.4", "| None"]


def test_compare_finds_the_floor_of_a_power(tmp_path, capsys):
    """A loss that bends towards what no size can learn, read as a power with a smaller exponent."""
    runs = [finished(tmp_path / str(w), w, 0, 0.5 + 16 / w, w / 512) for w in (8, 32, 128, 512)]
    study.main(["compare", *runs, "--show", "val_t2i"])
    pure, above = capsys.readouterr().out.splitlines()[6:8]
    assert "FLOPs^-0.1" in pure
    assert [float(x) for x in re.findall(r"-?\d\.\d+", above)] == pytest.approx([0.5, -0.5, 1.0], abs=0.01)


def test_the_laws_of_the_page_follow_from_the_numbers_kept_for_it(capsys):
    """Numbers of an earlier run that compare cannot read any more, or fits to other laws."""
    assets = Path(study.__file__).parent.parent / "assets"
    study.main(["compare", str(assets / "scale.json"), "--show", "val_t2i"])
    laws = re.findall(r"val_t2i ~ .*FLOPs\^-[\d.]+", capsys.readouterr().out)
    page = (assets / "README.md").read_text(encoding="utf-8")
    assert len(laws) == 2 and all(law in page for law in laws)


def test_compare_draws_a_plot(tmp_path):
    """--plot that ends in a traceback, or leaves no picture."""
    pytest.importorskip("matplotlib")
    runs = [finished(tmp_path / str(w), w, 0, 16 / w, w / 100) for w in (4, 16, 64)]
    study.main(["compare", *runs, "--plot", str(tmp_path / "x.png")])
    assert data.load_image(tmp_path / "x.png").width > 500


def test_compare_names_what_is_no_run(tmp_path):
    """A traceback that does not say which of many runs is none."""
    run = tmp_path / "run"
    finished(run, 4, 0, 1.0, 0.5)
    (tmp_path / "saved.json").write_text('[{"act": 3}]')
    for path, name in (("none", "config.json"), ("saved.json", "saved.json"), ("none.json", "none.json"),
                       ("run", "log.jsonl"), ("run", "config.json"), ("run", "model.pt")):
        if path == "run":
            (run / name).write_text('{"act": 3, "step": 1}')
        with pytest.raises(SystemExit, match=f"study.py: .*{name}: "):
            study.main(["compare", str(tmp_path / path)])


def test_sweep_scores_and_draws_every_value(run, tmp_path, monkeypatch, capsys):
    """A value that does not reach the decode loop, a picture that misses one, runs that cannot be scored."""
    scenic, drawn = dataclasses.replace(run, config={"data": None, "withheld": 3}), []
    monkeypatch.setattr(sample, "load", lambda path: scenic)
    draw = sample.text_to_image
    monkeypatch.setattr(sample, "text_to_image", lambda *args: drawn.append(args[2]) or draw(*args))
    files = ["--plot", str(tmp_path / "x.png"), "--save", str(tmp_path / "x.json")]
    study.main(["sweep", "a", "b", "--values", "0,2.5", "--n", "3", *files])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| guidance | t2i_exact | t2i_unseen_combinations |"
    assert [line.split()[1] for line in lines[2:]] == ["0", "2.5"]
    assert [s.guidance for s in drawn] == [0] * 5 + [2.5] * 5       # 2 runs, 2 kinds of scenes, the picture
    assert data.load_image(tmp_path / "x.png").size == (8 * 20 - 4, 2 * 20 - 4)
    kept = json.loads((tmp_path / "x.json").read_text())
    assert [row["guidance"] for row in kept] == ["0", "2.5"] and len(kept[0]["t2i_exact"]) == 2
    scenic.sampling = sample.GREEDY                                 # in which top-k would change nothing
    study.main(["sweep", "a", "--option", "top_k", "--values", "3", "--n", "3"])
    assert drawn[-1].temperature == 1 and drawn[-1].top_k == 3


@pytest.mark.parametrize("config, argv, words", [
    ({"data": None}, ["--option", "top_k", "--values", "1,x"], "--values 1,x"),
    ({"data": None}, ["--values", "1", "--n", "0"], "--n 0"),
    ({"data": None}, ["--values", "nan"], "guidance nan"),
    ({"data": "own"}, ["--values", "1"], "only runs of train.py on built-in scenes"),
    ({}, ["--values", "1"], "only runs of train.py on built-in scenes")])
def test_sweep_refuses_in_one_sentence(run, monkeypatch, config, argv, words):
    """A traceback, or scores of pictures that nobody can grade."""
    config |= {"withheld": 3} if config else {}
    monkeypatch.setattr(sample, "load", lambda path: dataclasses.replace(run, config=config))
    with pytest.raises(SystemExit, match=f"study.py: .*{words}"):
        study.main(["sweep", "a", *argv])
