"""Faults are injected, one after the other: kills, signals, full disks, vanished files, wrong numbers, bad input, evil files."""

import ast
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

import data
import sample
import train
from model import ModelConfig, Transformer
from test_data import VOCAB, Bytes, documents, mixed, put, take, texts_of
from test_house import ROOT
from test_train import TINY, few, tiny_flags, weights     # few is a fixture
from test_vqgan import Evil
from vqgan import VQGAN, VQGANConfig

BRIEF = dict(TINY, eval_n=0)


def run(out, **options):
    train.train(train.Config(out=str(out), **{**BRIEF, **options}))


def end(*argv):
    """What the command line says last, and its exit code."""
    with pytest.raises(SystemExit) as caught:
        train.main(list(map(str, argv)))
    assert caught.value.code not in (0, None)
    return str(caught.value.code)


def flags(out, **options):
    return ["--out", str(out), *tiny_flags(), *(x for k, v in options.items() for x in (f"--{k}", str(v)))]


def log_of(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu", "waiting", "seconds")} for line in lines]


def same_run(a, b):
    """Weights bit for bit, optimizers, and the log but for what a clock measures."""
    for name in ("vqgan.pt", "model.pt"):
        x, y = (torch.load(Path(run) / name, weights_only=True) for run in (a, b))
        assert x["model"].keys() == y["model"].keys() and all(torch.equal(x["model"][k], y["model"][k]) for k in x["model"])
        assert str(x["optimizer"]) == str(y["optimizer"]) and x["step"] == y["step"] and x.get("data") == y.get("data")
    assert log_of(a) == log_of(b)
    assert not list(Path(b).rglob("*.partial"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to; nobody may change it."""
    out, patch = tmp_path_factory.mktemp("whole") / "run", pytest.MonkeyPatch()
    full = data.built_in
    patch.setattr(data, "built_in", lambda *source: shortened(full(*source, train=40, val=4, unseen=2)))
    run(out)
    patch.undo()
    return out


def shortened(splits):
    return {name: split._replace(texts=split.texts[::40]) for name, split in splits.items()}


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


class Killed(BaseException):
    """No handler of ours sees it, as none sees SIGKILL."""


# ---------------------------------------------------------------------------------------------------------------------
# Killed, asked to stop

def test_a_run_killed_before_every_second_save_ends_as_if_nothing_had_happened(few, whole, tmp_path, monkeypatch):
    """Half a checkpoint or shard that is trusted, a lost optimizer, a log line twice or half, a rest that is in the way."""
    replace, out, kills = os.replace, tmp_path / "cut", 0

    def dies_at_the_second(source, target, saved=[]):
        if str(target).endswith(".pt") and saved:
            shutil.copy(source, str(source) + ".kept")      # SIGKILL would leave it
            raise Killed
        saved += [target] * str(target).endswith(".pt")
        replace(source, target)
    for _ in range(20):
        monkeypatch.setattr(os, "replace", lambda a, b, saved=[], f=dies_at_the_second: f(a, b, saved))
        try:
            run(out, resume=True)
            break
        except Killed:
            kills += 1
            for rest in out.rglob("*.kept"):
                rest.rename(str(rest).removesuffix(".kept"))
            with open(out / "log.jsonl", "a") as file:
                file.write('{"act": 3, "st')
        finally:
            monkeypatch.setattr(os, "replace", replace)
    assert kills == 6       # two saves of the tokenizer, three shards, two of the transformer; the first has no one before it
    same_run(whole, out)


def at_step(monkeypatch, act, step, do):
    """Call do() while a step of an act is under way."""
    schedule = train.schedule

    def hooked(now, steps, warmup, decay):
        if now + 1 == step and (decay == 0.6) == (act == 1):
            do()
        return schedule(now, steps, warmup, decay)
    monkeypatch.setattr(train, "schedule", hooked)


@pytest.mark.parametrize("act, name, number", [(1, "vqgan.pt", signal.SIGTERM), (3, "model.pt", signal.SIGINT)])
def test_asked_to_stop_a_run_ends_its_step_saves_and_goes_on(few, whole, tmp_path, monkeypatch, capsys, act, name, number):
    """Hours of work lost to the queue's time limit, or an exit code that looks like success."""
    out, handlers = tmp_path / "run", [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        at_step(patch, act, 2, lambda: os.kill(os.getpid(), number))
        assert end(*flags(out, eval_n=0)) == str(128 + number)
    assert torch.load(out / name, weights_only=True)["step"] == 2 and "--resume" in capsys.readouterr().err
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    run(out, resume=True)
    same_run(whole, out)


@pytest.mark.parametrize("act, name", [(1, "encode_pictures"), (3, "sample.evaluate")])
def test_asked_to_stop_after_the_last_step_nothing_more_is_begun(few, whole, tmp_path, monkeypatch, act, name):
    """A signal in the last save of an act that is forgotten: another act, or all scores, and an exit code of success."""
    save = data.save_atomically

    def asked(value, path):
        save(value, path)
        if value["step"] == TINY["vq_steps" if act == 1 else "steps"]:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(data, "save_atomically", asked)
        patch.setattr(f"train.{name}", None)
        assert end(*flags(tmp_path)) == "143"
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


def test_a_second_ctrl_c_stops_at_once_and_loses_no_checkpoint(few, whole, tmp_path, monkeypatch):
    """Somebody who presses twice waits for a step that never ends."""
    with monkeypatch.context() as patch:
        at_step(patch, 3, 5, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
        assert end(*flags(tmp_path, eval_n=0)) == "130"
    assert torch.load(tmp_path / "model.pt", weights_only=True)["step"] == 3
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


def test_asked_to_stop_while_encoding_no_shard_is_lost(few, whole, tmp_path, monkeypatch):
    """Hours of encoding that begin anew, or half of the shards taken for all of them."""
    write = data.write_shard

    def asked(path, *rest):
        if "val" in path.name:
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_shard", asked)
        assert end(*flags(tmp_path, eval_n=0)) == "143"
    assert [file.name for file in (tmp_path / "codes").iterdir()] == ["train-00000.pt"]
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


DRIVER = """import os, signal, sys
import data, test_train, train
full = data.built_in
data.built_in = lambda *source: test_train.shortened(full(*source, train=40, val=4, unseen=2))
{fault}
train.main(sys.argv[1:])
"""


def launch(tmp_path, out, fault, *extra, processes=0, restarts=0):
    """A real process, or torchrun with some, that trains on few pictures."""
    script = put(tmp_path / "driver.py", DRIVER.format(fault=fault))
    env = dict(os.environ, OMP_NUM_THREADS="1", TQDM_DISABLE="1", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--max_restarts", str(restarts)]
    return subprocess.Popen([sys.executable, *torchrun * (processes > 0), str(script), *flags(out, eval_n=0), *extra], env=env,
                            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_real_process_killed_at_random_points_again_and_again(tmp_path):
    """Whatever nobody thought of: SIGKILL asks no one."""
    slowly = "step = train.step_all\ntrain.step_all = lambda *a: (__import__('time').sleep(0.3), step(*a))"
    started = time.time()
    launch(tmp_path, tmp_path / "free", slowly).communicate()
    rng, took, kills = random.Random(0), time.time() - started, 0
    for seconds in [took * rng.uniform(0.4, 0.95) for _ in range(6)] + [None]:
        process = launch(tmp_path, tmp_path / "run", slowly, "--resume")
        try:
            process.communicate(timeout=seconds)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert process.returncode == 0 and kills
    same_run(tmp_path / "free", tmp_path / "run")


DIES = """step = train.step_all
count = []
def dies(*rest):
    count.append(0)
    if len(count) == 11 and os.environ["RANK"] == "1" and {when}:
        os.kill(os.getpid(), signal.SIGKILL)
    step(*rest)
train.step_all = dies"""


@pytest.mark.slow
def test_torchrun_goes_on_by_itself_after_a_worker_died(tmp_path):
    """A run that has to be found dead in the morning and started again by hand."""
    texts = []
    for name, when in (("whole", "False"), ("cut", "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'")):
        process = launch(tmp_path, tmp_path / name, DIES.replace("{when}", when), processes=2, restarts=1)
        texts.append(process.communicate(timeout=600)[0])
        assert process.returncode == 0, texts[-1]
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_with_one_message(tmp_path):
    """The others wait for it until somebody looks, or each fills the screen with a traceback of its lost connection."""
    process = launch(tmp_path, tmp_path / "run", DIES.replace("{when}", "True"), processes=2)
    text = process.communicate(timeout=600)[0]
    assert process.returncode and text.count("Root Cause") == 1 and 'driver.py", line' not in text
    assert torch.load(tmp_path / "run" / "model.pt", weights_only=True)["step"] == 3


@pytest.mark.slow
def test_under_torchrun_all_processes_stop_together(tmp_path):
    """One process that waits for ever for another that has gone."""
    asks = DIES.replace("{when}", "True").replace("SIGKILL", "SIGTERM").replace("== 11", "== 8")
    process = launch(tmp_path, tmp_path / "run", asks, processes=2)
    text = process.communicate(timeout=600)[0]
    assert process.returncode and text.count("stopped after step 3 of the transformer, which") == 1
    assert torch.load(tmp_path / "run" / "model.pt", weights_only=True)["step"] == 3 and 'driver.py", line' not in text


def test_a_worker_that_torchrun_restarts_goes_on(monkeypatch, copy):
    """A restart that refuses the run in --out, or deletes it because the command says --overwrite."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for extra in ([], ["--overwrite"]):
        cfg = train.configure(flags(copy, eval_n=0) + extra)
        assert cfg.resume and not cfg.overwrite


# ---------------------------------------------------------------------------------------------------------------------
# An existing run

def test_overwrite_deletes_the_run_and_nothing_else(few, copy):
    """Drawings of the old run among the new ones; a user's own file that is gone; a good run lost to a typing error."""
    put(copy / "samples" / "drawn-999999.png", b"old")
    put(copy / "codes" / "train-00007.pt", b"old")
    put(copy / "notes.txt", "mine")
    before = (copy / "model.pt").read_bytes()
    assert "nowhere" in end(*flags(copy, data="nowhere"), "--overwrite") and (copy / "model.pt").read_bytes() == before
    assert "choose one" in end(*flags(copy), "--overwrite", "--resume") and (copy / "model.pt").read_bytes() == before
    train.main([*flags(copy, seed=5, eval_n=0), "--overwrite"])
    assert not (copy / "samples" / "drawn-999999.png").exists() and not (copy / "codes" / "train-00007.pt").exists()
    assert (copy / "notes.txt").read_text() == "mine" and (copy / "model.pt").read_bytes() != before
    before = (copy / "model.pt").stat().st_mtime_ns
    train.main(["--out", str(copy), "--resume"])        # its config.json still says --overwrite
    assert (copy / "model.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"zzz": 1}', b'{"ch_mult": [1], "rows": "4"}'])
def test_a_damaged_configuration_is_named(copy, content):
    """A traceback, or a run that goes on with other settings than it began with."""
    put(copy / "config.json", content)
    assert f"{copy / 'config.json'}: " in end("--out", copy, "--resume")


# ---------------------------------------------------------------------------------------------------------------------
# Disks, folders and files that fail

def test_a_full_disk_leaves_the_last_good_checkpoint(few, whole, tmp_path, monkeypatch):
    """A checkpoint of zeros, or a traceback that leaves one wondering what is lost."""
    replace, fsync = os.replace, os.fsync

    def full(_):
        if (tmp_path / "model.pt").exists():
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    said = end(*flags(tmp_path, eval_n=0))
    assert "model.pt: not written (No space left on device)" in said and "is whole: go on with --resume" in said
    assert torch.load(tmp_path / "model.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(os, "fsync", fsync)
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


def test_a_file_that_may_not_grow_leaves_the_old_one(tmp_path):
    """torch.save turns the disk's error into a RuntimeError over positions in a file, safetensors into one of its own."""
    path = tmp_path / "x.pt"
    data.save_atomically({"a": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OSError, match="x.pt: not written .File too large., and left as it was"):
            data.save_atomically({"a": torch.zeros(100_000)}, path)
        with pytest.raises(OSError, match="export: weights not written"):
            Transformer(ModelConfig()).save_pretrained(tmp_path / "export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path, weights_only=True) == {"a": 1} and {p.name for p in tmp_path.iterdir()} == {"x.pt", "export"}


def test_a_folder_that_cannot_be_written_is_one_sentence(few, tmp_path):
    """Permissions, seen from any user: root may write everywhere, but not below a file."""
    file = put(tmp_path / "file", "x")
    assert "nothing was written" in end(*flags(file)) and "nothing was written" in end(*flags(file / "run"))
    put(tmp_path / "run" / "samples", "x")
    assert "samples" in end(*flags(tmp_path / "run"))
    assert file.read_text() == "x"


def test_samples_that_cannot_be_written_end_the_run_and_lose_no_checkpoint(few, whole, tmp_path, monkeypatch):
    """A traceback over a picture for samples/ that leaves one wondering what of the training is lost."""
    def spoil():
        shutil.rmtree(tmp_path / "samples")
        put(tmp_path / "samples", "no folder")
    with monkeypatch.context() as patch:
        at_step(patch, 3, 5, spoil)
        said = end(*flags(tmp_path, eval_n=0))
    assert "samples" in said and "is whole: go on with --resume" in said
    (tmp_path / "samples").unlink()
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


OWN = dict(mix="t2i=1,i2t=1", workers=0, eval_n=0)


def own_pictures(folder, n=8):
    folder.mkdir(parents=True)
    for i, p in enumerate(data.scenes(n, 0, "own")):
        p.open().save(folder / f"{i}.png")
        put(folder / f"{i}.txt", p.captions[0])
    return folder


def tarred(folder, path):
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return path


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_data_that_vanish_end_the_run_in_one_sentence(tmp_path, monkeypatch, kind):
    """A traceback out of a reader's process, or a run that goes on with nothing."""
    source = own_pictures(tmp_path / "own")
    source = tarred(source, tmp_path / "own.tar") if kind == "tar" else source
    with monkeypatch.context() as patch:
        at_step(patch, 1, 5, lambda: source.rename(tmp_path / "gone"))
        said = end(*flags(tmp_path / "run", data=source, **OWN))
    assert str(source) in said and "\n" not in said
    assert torch.load(tmp_path / "run" / "vqgan.pt", weights_only=True)["step"] == 3
    (tmp_path / "gone").rename(source)
    train.main([*flags(tmp_path / "run", data=source, **OWN), "--resume"])


def test_pictures_that_could_not_be_read_are_logged_once(tmp_path):
    """A resumed run that encodes its shards again, or lists the same pictures twice."""
    source = own_pictures(tmp_path / "own")
    (source / "folder.png").mkdir()
    put(source / "noise.jpg", b"noise")
    train.main(flags(tmp_path / "run", data=source, **OWN))
    shard = tmp_path / "run" / "codes" / "train-00000.pt"
    before = shard.stat().st_mtime_ns
    train.main([*flags(tmp_path / "run", data=source, **OWN), "--resume"])
    lines = [line for line in log_of(tmp_path / "run") if line["act"] == 2]
    assert shard.stat().st_mtime_ns == before and len(lines) == 1
    assert "folder.png" in str(lines) and "noise.jpg" in str(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that go wrong

def poison(monkeypatch, act, step, how):
    """From one step of training on, or only there, the loss or the gradient alone is not finite."""
    owner, calls = {1: VQGAN, 3: train.Transformer}[act], itertools.count(1)
    forward = owner.forward

    def wrong(self, *args, **options):
        out = forward(self, *args, **options)
        if not self.training or len(args) + len(options) < 2 or next(calls) != step:
            return out
        value = out.pixels if act == 1 else out
        if how == "loss":
            value = value * math.nan
        else:
            value.register_hook(lambda g: g * math.inf)
        return out._replace(pixels=value) if act == 1 else value
    monkeypatch.setattr(owner, "forward", wrong)


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("act, name", [(1, "vqgan.pt"), (3, "model.pt")])
def test_a_step_that_is_not_finite_stops_the_run_or_is_left_out(few, tmp_path, monkeypatch, act, name, how):
    """A checkpoint full of NaN over the last good one, found days later."""
    with monkeypatch.context() as patch:
        poison(patch, act, 5, how)
        said = end(*flags(tmp_path, eval_n=0))
    assert f"act {act}, step 5: the {how}" in said and f"{tmp_path / name} holds the last good one" in said
    saved = torch.load(tmp_path / name, weights_only=True)
    assert saved["step"] == 3 and all(x.isfinite().all() for x in saved["model"].values())
    with monkeypatch.context() as patch:
        poison(patch, act, 2, how)          # the fifth step, after the checkpoint of the third
        train.main([*flags(tmp_path, eval_n=0), "--resume", "--skip_nonfinite", "1"])
    saved = torch.load(tmp_path / name, weights_only=True)
    assert saved["step"] == 6 and saved["skipped"] == 1 and all(x.isfinite().all() for x in saved["model"].values())
    left_out, = (line for line in log_of(tmp_path) if "nonfinite" in line)
    assert (left_out["act"], left_out["step"]) == (act, 5) and how in str(left_out["nonfinite"])


def test_a_step_left_out_leaves_no_trace_in_weights_and_optimizers():
    """NaN that a skipped step leaves behind in the momentum or the gradient, and that the next one spreads."""
    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 3), (3,)))
    optimizers = train.make_optimizers([matrix], [matrix, vector], 0.1, 0.1)
    for p in (matrix, vector):
        p.grad = torch.full_like(p, math.nan)
    train.step_all(optimizers, False)
    assert len(optimizers) == 2 and not any(o.state for o in optimizers)
    assert all((p == 1).all() and p.grad is None for p in (matrix, vector))


def test_a_codebook_that_collapses_is_reported(tmp_path, capsys):
    """A tokenizer that says everything with a handful of codes, and nobody notices before the drawings."""
    cfg = train.Config(out=str(tmp_path), **BRIEF)      # 16 codes, 6 steps
    process = train.set_up(cfg)
    for used, step in ((1, 5), (1, 3), (2, 5)):
        counts = torch.tensor([7] * used + [0] * (16 - used))
        train.report_usage(cfg, counts, step, process, train.Log(tmp_path / "log.jsonl", process))
        assert ("collapsed" in capsys.readouterr().out) == (used == 1 and step == 5)
        assert log_of(tmp_path)[-1] == dict(act=1, step=step + 1, codes_used=used, perplexity=pytest.approx(used))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("flag, value", [
    *(("steps", x) for x in (0, -5)), ("rows", 0), ("vq_batch", 0), ("log_every", 0), ("save_every", 0),
    ("vq_restart_every", 0), ("heads", 3), ("hidden_size", 30), ("clip", -1), ("clip", "nan"), ("warmup", 2), ("uncond", 2),
    ("optimizer", "adam"), ("train", "rows"), ("image_rows", "fixed"), ("device", "abacus"), ("image_size", 50),
    ("image_size", 0), ("patch", 0), ("codes", 0), ("seed", -1), ("seed", 10 ** 30), ("workers", -1), ("lr", "nan"),
    ("lr_adam", "inf"), ("ch", 30), ("ch_mult", "0"), ("vq_steps", 0), ("accumulate", 0), ("accumulate", 3), ("context", 0),
    ("context", 9), ("layers", 0), ("eval_n", -1), ("mix", "t2i"), ("mix", "t2i=-1"), ("mix", "t2i=nan"), ("mix", "text=inf"),
    ("mix", "draw=1"), ("perceptual", "nowhere"), ("vqgan", "nowhere"), ("init", "nowhere"), ("adversarial", -1),
    ("weight_decay", -1), ("code_dim", 0), ("skip_nonfinite", -1), ("data", "nowhere"), ("text", "nowhere.txt")])
def test_a_flag_out_of_range_is_named_before_anything_is_written(few, tmp_path, flag, value):
    """Hours of the first act before the third one finds a typing error."""
    said = end(*flags(tmp_path / "run", **{flag: value}))
    assert (f"--{flag} {value}" in said or f"{value}" in said and flag in ("data", "text", "vqgan", "init")) and "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv", [["--steps", "abc"], ["--preset", "huge"], ["--ch_mult", "1,x"], ["--stepps", "3"]])
def test_a_flag_of_the_wrong_type_is_an_error(argv, capsys):
    """A typing error that is passed over, and a run that is not the one that was asked for."""
    assert end(*argv) == "2" and argv[0] in capsys.readouterr().err


def vqgan_file(path):
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=8, n_embed=16, embed_dim=8, patch=16))
    torch.save({"config": asdict(model.config), "model": model.state_dict()}, path)
    return path


def encoded(*grids):
    return "".join(json.dumps(dict(text="t", vqcode_512=[top] * n)) + "\n" for n, top in grids)


GOOD = '{"image": "own/0.png", "text": "a"}\n'
BAD = {
    "a folder without pictures": ("empty/notes.txt", "x", "no pictures"),
    "a caption that is a folder": ("own/0.txt/x", "x", "own/0.txt: not a readable UTF-8 text"),
    "a caption of another encoding": ("own/0.txt", b"\xe9t\xe9", "own/0.txt: not a readable UTF-8 text"),
    "a broken note": ("own/0.json", "{", "own/0.png: its .json"),
    "a broken line": ("x.jsonl", GOOD + "{\n", "x.jsonl, line 2: not JSON"),
    "a caption that is a number": ("x.jsonl", GOOD + '{"image": "own/0.png", "text": 3}', "x.jsonl, line 2: no string 'text'"),
    "a binary list": ("x.jsonl", b"\xff\xfe\0", "x.jsonl: not a readable UTF-8 text"),
    "an empty list": ("x.jsonl", "\n", "x.jsonl: no pictures"),
    "only empty captions": ("x.jsonl", GOOD.replace('"a"', '" "'), "there are no examples of it"),
    "a list of pictures that are not there": ("x.jsonl", GOOD.replace("own", "off") * 4, "could be read; the first: "),
    "codes without their tokenizer": ("codes.jsonl", encoded((16, 3)) * 3, "--vqgan"),
    "codes of two grids": ("vqgan.jsonl", encoded((16, 3), (9, 3)) * 6, "3x3 codes up to 3 are not of this VQGAN"),
    "codes of a larger codebook": ("vqgan.jsonl", encoded((16, 99)) * 6, "4x4 codes up to 99 are not of this VQGAN"),
    "an empty tar": ("x.tar", b"", "x.tar: not a readable tar file"),
    "a tar that is none": ("x.tar", b"noise" * 500, "x.tar: not a readable tar file"),
    "a picture": ("x.png", b"noise", "x.png: not a folder, .jsonl or .tar"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_one_sentence_that_names_the_place(tmp_path, name):
    """A traceback, or training on what is left, where one of somebody's many files is wrong."""
    place, content, words = BAD[name]
    own_pictures(tmp_path / "own")
    if "a folder" in name and "own" in place:
        (tmp_path / "own" / "0.txt").unlink()
    put(tmp_path / place, content)
    source = tmp_path / place if "/" not in place else tmp_path / Path(place).parts[0]
    options = dict(vqgan=vqgan_file(tmp_path / "v.pt")) if place == "vqgan.jsonl" else {}
    said = end(*flags(tmp_path / "run", data=source, **OWN, **options))
    assert words in said and "\n" not in said
    assert not (tmp_path / "run" / "model.pt").exists() and not list((tmp_path / "run").glob("codes/*"))


def test_a_tar_with_a_caption_of_another_encoding_is_named(tmp_path):
    """Replacement characters that the model learns to write."""
    source = own_pictures(tmp_path / "own", 2)
    put(source / "1.txt", b"\xe9")
    with pytest.raises(ValueError, match="x.tar:1.txt: not a readable UTF-8"):
        data.read_pictures(tarred(source, tmp_path / "x.tar"))


def test_a_run_among_its_own_data_is_refused(tmp_path):
    """Drawings of the model that become its training pictures."""
    source = own_pictures(tmp_path / "own")
    for out in (source, source / "runs" / "x"):
        assert "--out" in end(*flags(out, data=source, **OWN))
    assert not (source / "runs").exists() and len(list(source.iterdir())) == 16


def test_enormous_captions_are_left_out_and_counted(tmp_path, capsys):
    """A run that ends at its first pictures for samples/, as those are drawn from a caption that nothing can read."""
    source = own_pictures(tmp_path / "own", 9)
    for i in range(9):
        put(source / f"{i}.txt", "a circle" if i == 4 else "word " * 1000)
    train.main(flags(tmp_path / "run", data=source, **OWN))
    said, log = capsys.readouterr().out, log_of(tmp_path / "run")
    assert "longer than --context" in said and any(line.get("dropped") for line in log)
    assert not any(line.get(f"val_{task}") == 0 for line in log for task in data.TASKS)


def test_pictures_without_captions_or_files_are_scored(few, tmp_path):
    """Scores, after all the training, of captions that nobody gave or of pictures that are codes alone."""
    source = own_pictures(tmp_path / "own")
    for i in range(8):
        (source / f"{i}.txt").unlink()
        put(source / f"{i}.json", json.dumps({"qa": [["what?", "a circle"]]}))
    train.main(flags(tmp_path / "run", data=source, **OWN | {"eval_n": 4, "mix": "t2i=1,vqa=1"}))
    rows = [{"data_type": "image_text", "text": "a", "vqcode_512": [0] * 16} for _ in range(4)]
    put(tmp_path / "codes.jsonl", "\n".join(map(json.dumps, rows)))
    train.main(flags(tmp_path / "next", data=tmp_path / "codes.jsonl", vqgan=tmp_path / "run" / "vqgan.pt",
                     **OWN | {"eval_n": 4, "mix": "t2i=1,vqa=1"}))
    for name in ("run", "next"):
        assert log_of(tmp_path / name)[-1]["scores"]["caption_exact"] is None


def test_a_few_dead_files_stop_no_batch(tmp_path):
    """A process whose two pictures of a step are both unreadable: the run ends, and each resumption at the same step."""
    source = own_pictures(tmp_path / "own", 12)
    for i in range(0, 12, 2):
        put(source / f"{i}.png", b"noise")
    train.main(flags(tmp_path / "run", data=source, **OWN, vq_batch=1))
    assert torch.load(tmp_path / "run" / "vqgan.pt", weights_only=True)["step"] == TINY["vq_steps"]


def test_an_extra_that_is_not_installed_is_named_with_its_command(tmp_path, monkeypatch):
    """An ImportError out of the middle of a file, or the command of another project."""
    for package in ("tokenizers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    put(tmp_path / "hf" / "tokenizer.json", "{}")
    own_pictures(tmp_path / "own")
    for init in (tmp_path / "hf", "owner/name"):
        assert 'pip install -e ".[pretrained]"' in end(*flags(tmp_path / "run", init=init, data=tmp_path / "own"))
    assert not (tmp_path / "run").exists()


def changed(path, **entries):
    saved = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in {**saved, **entries}.items() if v is not None}, path)


BROKEN = {
    "nothing": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(b"noise" * 50),
    "half": lambda path: path.write_bytes(path.read_bytes()[:-2000]),
    "a list": lambda path: torch.save([1], path),
    "another project": lambda path: torch.save({"state_dict": {}, "epoch": 3}, path),
    "another network": lambda path: changed(path, model={"x": torch.zeros(1)}),
    "no optimizer": lambda path: changed(path, optimizer=None),
    "no step": lambda path: changed(path, step=None),
    "code": lambda path: torch.save({"model": Evil(path.with_name("evil"))}, path),
}


@pytest.mark.parametrize("name", ["vqgan.pt", "model.pt"])
@pytest.mark.parametrize("damage", BROKEN)
def test_a_checkpoint_that_is_none_is_named_and_runs_no_code(few, copy, name, damage):
    """A traceback of the unpickler, a run that starts anew in silence, or a stranger's code."""
    BROKEN[damage](copy / name)
    left = (copy / name).read_bytes()
    said = end("--out", copy, "--resume")
    assert f"{copy / name}: " in said and "\n" not in said and (copy / name).read_bytes() == left
    if damage not in ("no optimizer", "no step"):       # which sampling does not need
        with pytest.raises(SystemExit, match=f"{name}: "):
            sample.main(["text", "x", "--run", str(copy), "--device", "cpu"])
    assert not (copy / "evil").exists()


def test_a_tokenizer_that_did_not_make_the_codes_is_refused(few, copy):
    """Drawings that are noise, without an error, as the vqgan.pt beside a model is another one."""
    changed(copy / "vqgan.pt", model={k: v + 1 for k, v in weights(copy, "vqgan.pt").items()})
    assert "another VQGAN" in end("--out", copy, "--resume")
    with pytest.raises(SystemExit, match="not the VQGAN whose codes"):
        sample.main(["t2i", "x", "--run", str(copy), "--device", "cpu"])


@pytest.mark.parametrize("argv, words", [
    (["t2i", "word " * 500], "too long"), (["text", "why " * 500], "too long"), (["vqa", "x.png", "why " * 500], "too long"),
    (["text", "x", "--n", "0"], "--n 0"), (["text", "x", "--top-p", "0"], "--top_p"), (["text", "x", "--top-k", "-1"], "--top_k"),
    (["t2i", "x", "--temperature", "nan"], "--temperature"), (["t2i", "x", "--guidance", "nan"], "--guidance"),
    (["t2i", "x", "--seed", "99999999999"], "--seed"), (["t2i", "x", "--batch", "0"], "--batch"),
    (["t2i", "x", "--device", "abacus"], "--device abacus"), (["t2i", "x", "--out", "nowhere/x.png"], "nowhere"),
    (["t2i", "x", "--out", "x.nothing"], ".nothing"), (["i2t", "nowhere.png"], "nowhere.png"), (["t2i"], "--prompts FILE"),
    (["t2i", "x", "--vqgan", "nowhere.pt"], "nowhere.pt"), (["t2i", "--prompts", "x.png"], "x.png: not a readable UTF-8"),
    (["t2i", "--prompts", "p.txt", "--save-dir", "p.txt"], "p.txt"), (["export", "p.txt"], "p.txt")])
def test_sampling_errors_are_one_sentence(whole, tmp_path, monkeypatch, argv, words):
    """A traceback for a typing error, or a file that a command which failed has left."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "p.txt", "a\nb\n")
    data.draw(data.random_scene(random.Random(0))).save("x.png")
    with pytest.raises(SystemExit) as caught:
        sample.main([*argv, "--run", str(whole), *([] if "--device" in argv else ["--device", "cpu"])])
    assert words in str(caught.value.code) and "\n" not in str(caught.value.code)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.txt", "x.png"]


def test_a_damaged_layout_is_named(whole, tmp_path):
    """An export with a broken layout that ends in a traceback and names no file."""
    pytest.importorskip("safetensors")
    sample.main(["export", str(tmp_path), "--run", str(whole), "--device", "cpu"])
    for content in ("{", "[]", "{}", "null", '{"vocab": 3}'):       # an empty one is not Liquid's, which has none
        put(tmp_path / sample.LAYOUT, content)
        with pytest.raises(ValueError, match=sample.LAYOUT):
            sample.load(tmp_path, device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# No code from files

FORBIDDEN = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "subprocess", "socket", "urllib",
             "requests", "http", "shelve", "marshal", "ftplib"}


def names_used(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from [alias.name.split(".")[0] for alias in node.names] + [(getattr(node, "module", "") or "").split(".")[0]]
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("name", ["vqgan", "model", "data", "sample", "train"])
def test_no_source_runs_code_from_a_file_or_reaches_for_the_network(name):
    """An unpickler that obeys strangers; a shell; a download that nobody asked for."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    assert not FORBIDDEN & set(names_used(tree))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if ast.unparse(call.func) in ("torch.load", "torch.hub.load", "np.load"):
            assert ast.unparse(call.func) == "torch.load" and options["weights_only"] == "True"
    downloads = [call for call in calls if "snapshot_download" in ast.unparse(call.func)]
    assert len(downloads) == (name == "data")       # --init with the name of a repository


def test_an_evil_shard_is_made_again_and_runs_nothing(few, copy):
    """A stranger's code that runs when a run is resumed, or a shard so odd that it stops it."""
    torch.save({"format": "nanoLiquid codes 2", "rows": Evil(copy / "evil")}, copy / "codes" / "val-00000.pt")
    train.main(["--out", str(copy), "--resume", "--eval_n", "0"])
    assert not (copy / "evil").exists()
    assert torch.load(copy / "codes" / "val-00000.pt", weights_only=True)["codes"].shape == (4, 4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Any bytes, any lengths

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
brief = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None,
                            suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])


def some_json():
    keys = st.sampled_from("image text image_path text_prompt vqcode_512 conversations value caption qa".split())
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("[1, 2, 3, 4]")
    inside = lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4)
    return st.recursive(leaves, inside, max_leaves=8)


def lines_of_json():
    return st.lists(some_json(), max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())


def survives(function, *args):
    try:
        function(*args)
    except ValueError as error:
        assert str(error) and not isinstance(error, UnicodeError)


@brief
@hypothesis.given(st.binary(max_size=300) | lines_of_json())
def test_readers_survive_any_bytes(tmp_path, content):
    """A traceback for somebody's strange file."""
    for name in ("x.txt", "x.jsonl", "x.tar", "x.png", "folder/x.txt", "folder/x.json", "tokenizer.json"):
        put(tmp_path / name, content)
    put(tmp_path / "folder" / "x.png", b"")
    for function, name in ((data.read_texts, "x.txt"), (data.read_texts, "x.jsonl"), (data.read_pictures, "x.jsonl"),
                           (data.read_pictures, "x.tar"), (data.read_pictures, "folder"), (data.load_image, "x.png"),
                           (VQGAN.load, "x.png"), (sample.read_model, "x.png"), (data.PretrainedTokenizer.load, ".")):
        survives(function, tmp_path / name)
    assert data.read_shard(tmp_path / "x.png", "x") is None


@brief
@hypothesis.given(st.data())
def test_readers_survive_damage_to_good_files(whole, tmp_path, random_data):
    """What only a nearly good file reaches: checks behind the first one."""
    shard, tar = whole / "codes" / "val-00000.pt", tmp_path / "good.tar"
    if not tar.exists():
        tarred(own_pictures(tmp_path / "own", 2), tar)
    for good, function in ((shard, partial(data.read_shard, fingerprint="x")), (tar, data.read_pictures),
                           (whole / "vqgan.pt", VQGAN.load)):
        raw = bytearray(good.read_bytes())
        for place in random_data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
            raw[place] = random_data.draw(st.integers(0, 255))
        put(tmp_path / f"x{good.suffix}", bytes(raw[:random_data.draw(st.integers(0, len(raw)))]))
        survives(function, tmp_path / f"x{good.suffix}")


@brief
@hypothesis.given(st.lists(st.integers(4, 61), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 5))
def test_packing_loses_and_repeats_no_token(lengths, rows, batches):
    """Every token of every example that was drawn stands in one row once, or waits; whatever the lengths."""
    texts = texts_of(lengths)
    loader = data.Loader({"text": texts}, {"text": 1}, VOCAB, Bytes(), rows, 63)
    placed = Counter(bytes(ids[1:-1]).decode() for batch, _ in take(loader, batches) for _, ids, _ in documents(batch))
    placed += Counter(texts[index] for _, _, index in loader.waiting)
    fresh = data.Loader({"text": texts}, {"text": 1}, VOCAB, Bytes(), rows, 63)
    assert placed == Counter(texts[fresh.draw()[2]] for _ in range(loader.drawn["text"]))


@hypothesis.settings(brief, max_examples=10)
@hypothesis.given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 99), st.integers(1, 20))
def test_each_example_once_an_epoch_for_any_processes_and_resume_point(world, per_rank, cut, seed, n):
    """Ranks that share an example, or a resumed run that reads some twice and others never."""
    options = dict(n=n, rows=world * per_rank, seed=seed)
    states = [None] * world
    found = Counter()
    for part in (cut, 3 - cut):
        for rank in range(world):
            loader = mixed(rank=rank, world=world, state=states[rank] and json.loads(json.dumps(states[rank])), **options)
            for batch, state in take(loader, part):
                found.update(str(document) for document in documents(batch))
                states[rank] = state
    assert all(state == states[0] for state in states)
    one = mixed(**options)
    assert found == Counter(str(document) for batch, _ in take(one, 3) for document in documents(batch))
    fresh = mixed(**options)
    keys = [fresh.draw() for _ in range(sum(one.drawn.values()))]       # (task, epoch, index)
    assert len(set(keys)) == len(keys)
    assert all({key for key in keys if key[:2] == (task, 0)} == {(task, 0, i) for i in range(n)}
               for task, drawn in one.drawn.items() if drawn >= n)
