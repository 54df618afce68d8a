"""Faults, one after the other: kills, signals, full disks, lost files, wrong numbers, bad input."""

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
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import data
import sample
import train
from model import ModelConfig, Transformer
from test_train import (TINY, few, few_scenes, flags, log_of, own_pictures, published, put, run, same_run,
                        saved)
from test_vqgan import Evil
from vqgan import VQGAN

ROOT = Path(__file__).parent.parent


def end(*argv):
    """What the command line says last, or its exit code."""
    with pytest.raises(SystemExit) as caught:
        train.main(list(map(str, argv)))
    assert caught.value.code not in (0, None) and "\n" not in str(caught.value.code)
    return str(caught.value.code)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to; nobody may change it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "built_in", few_scenes)
        run(out)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def at_step(patch, act, step, do):
    """Call do() while a step of an act is under way."""
    schedule, act_steps = train.schedule, TINY["vq_steps" if act == 1 else "steps"]

    def hooked(now, steps, **options):
        if (now + 1, steps) == (step, act_steps):
            do()
        return schedule(now, steps, **options)
    patch.setattr(train, "schedule", hooked)


# -----------------------------------------------------------------------------------------------------------
# Killed, asked to stop

class Killed(BaseException):
    """No handler of ours sees it, as none sees SIGKILL."""


def test_a_run_killed_before_every_second_save_ends_as_it_would_have(few, whole, tmp_path, monkeypatch):
    """Half a checkpoint or shard is trusted, an optimizer is lost, a log line is there twice or half."""
    replace, out, kills = os.replace, tmp_path / "cut", 0

    def dies_at_the_second(source, target, done=[]):
        if str(target).endswith(".pt") and done:
            shutil.copy(source, str(source) + ".kept")      # SIGKILL would leave it
            raise Killed
        done += [target] * str(target).endswith(".pt")
        replace(source, target)
    for _ in range(20):
        monkeypatch.setattr(os, "replace", partial(dies_at_the_second, done=[]))
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
    assert kills == 6       # of two saves of the tokenizer, three shards, two of the transformer
    same_run(whole, out)


TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.mark.parametrize("act, name, numbers, pause, step", [
    (1, "vqgan.pt", [TERM], 0, 4), (3, "model.pt", [HUP], 0, 4), (3, "model.pt", [INT, TERM], 0.0, 4),
    (3, "model.pt", [INT, INT], 0.4, 3)], ids=["term", "hup", "one that two deliver", "two"])
def test_asked_to_stop_a_run_ends_its_step_and_saves(few, whole, tmp_path, monkeypatch, capsys, act, name,
                                                     numbers, pause, step):
    """Hours of work are lost to a queue's limit, the exit code means success, or pressing twice is idle."""
    before = [signal.getsignal(number) for number in (TERM, INT, HUP)]

    def signals():
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)
    with monkeypatch.context() as patch:
        at_step(patch, act, 4, signals)
        assert end(*flags(tmp_path)) == str(128 + numbers[0])
    assert saved(tmp_path, name)["step"] == step and "go on with --resume" in capsys.readouterr().err
    assert before == [signal.getsignal(number) for number in (TERM, INT, HUP)]
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


@pytest.mark.parametrize("name, shards", [("vqgan.pt", 0), ("train-00000.pt", 1), ("model.pt", 3)])
def test_asked_to_stop_while_saving_nothing_more_is_begun(few, whole, tmp_path, monkeypatch, name, shards):
    """A signal in the last save is forgotten: another act, all shards, or all scores follow, and success."""
    save = data.save_atomically

    def asked(value, path):
        save(value, path)
        if path.name == name and value.get("step", 5) >= 5:
            os.kill(os.getpid(), TERM)
    with monkeypatch.context() as patch:
        patch.setattr(data, "save_atomically", asked)
        assert end(*flags(tmp_path, eval_n=2)) == "143"
    assert len(list(tmp_path.glob("codes/*"))) == shards and log_of(tmp_path)[-1]["act"] < 4
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


DRIVER = """import os, signal, sys, time
import data, train
from test_train import few_scenes
data.built_in, step_all, count = few_scenes, train.step_all, []
def step(*args):
    count.append(0)
    rank = os.environ.get("RANK")
    {fault}
    step_all(*args)
train.step_all = step
train.main(sys.argv[1:])
"""


def launch(out, fault, *extra, processes=0, **options):
    """A real process, or torchrun with some, that trains on few scenes; `fault` runs in every step."""
    script = put(out.parent / "driver.py", DRIVER.format(fault=fault))
    env = dict(os.environ, OMP_NUM_THREADS="1", TQDM_DISABLE="1",
               PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *torchrun * (processes > 0), str(script), *flags(out, **options), *extra]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def stop_all(process, out, lines):
    """SIGTERM to a process and all that it started, once the log has some lines -> what they said."""
    while process.poll() is None and not ((out / "log.jsonl").exists() and len(log_of(out)) >= lines):
        time.sleep(0.05)
    os.killpg(process.pid, TERM)
    return process.communicate(timeout=60)[0]


def test_a_real_process_that_reads_pictures_is_asked_to_stop_with_all_that_it_started(tmp_path):
    """Its readers die of a signal to the whole group, and with them the run, before it has saved."""
    source, out = own_pictures(tmp_path / "own", 12), tmp_path / "run"
    options = dict(data=str(source), mix="t2i=1,i2t=1", vq_steps=200)
    said = stop_all(process := launch(out, "time.sleep(0.02)", **options), out, 3)
    step = saved(out, "vqgan.pt")["step"]
    assert process.returncode == 143 and 3 <= step < 200 and step == len(log_of(out))
    assert said.count("train.py: ") == 1 and f"stopped after step {step} of the tokenizer" in said


@pytest.mark.slow
def test_a_real_process_killed_at_random_points_again_and_again(tmp_path):
    """Whatever nobody thought of: SIGKILL asks no one."""
    slowly, started, rng, kills = "time.sleep(0.3)", time.time(), random.Random(0), 0
    launch(tmp_path / "free", slowly).communicate()
    took = time.time() - started
    for seconds in [took * rng.uniform(0.4, 0.95) for _ in range(6)] + [None]:
        process = launch(tmp_path / "run", slowly, "--resume")
        try:
            process.communicate(timeout=seconds)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert process.returncode == 0 and kills
    same_run(tmp_path / "free", tmp_path / "run")


DIES = 'if len(count) == 10 and rank == "1": os.kill(os.getpid(), signal.SIGKILL)'    # in step 5 of act 3


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_with_one_message(tmp_path):
    """The others wait for it until somebody looks, or each fills the screen with a traceback."""
    process = launch(tmp_path / "run", DIES, processes=2)
    said = process.communicate(timeout=300)[0]
    assert process.returncode and said.count("Root Cause") == 1 and 'driver.py", line' not in said
    assert saved(tmp_path / "run")["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["", "shard"])
def test_under_torchrun_all_processes_stop_together(tmp_path, shard):
    """One waits for ever for another that has gone, or torchrun's own signal cuts the last save short."""
    out = tmp_path / "run"
    said = stop_all(process := launch(out, "time.sleep(0.1)", *shard, processes=2, steps=200), out, 8)
    step = saved(out)["step"]
    assert process.returncode and 3 <= step < 200 and 'driver.py", line' not in said
    assert said.count(f"stopped after step {step} of the transformer") == 1


# -----------------------------------------------------------------------------------------------------------
# An existing run

def test_overwrite_deletes_the_run_and_nothing_else(few, copy):
    """Drawings of the old run stay, a user's own file goes, a slip costs a good run, or --seed is idle."""
    old = [put(copy / name, b"old") for name in ("samples/drawn-999999.png", "codes/train-00007.pt")]
    mine, before = put(copy / "notes.txt", "mine"), (copy / "model.pt").read_bytes()
    assert "nowhere" in end(*flags(copy, data="nowhere"), "--overwrite")
    assert "choose one" in end(*flags(copy), "--overwrite", "--resume")
    assert (copy / "model.pt").read_bytes() == before
    train.main([*flags(copy, seed=5), "--overwrite"])
    assert (copy / "model.pt").read_bytes() != before
    assert not any(file.exists() for file in old) and mine.read_text() == "mine"
    before = (copy / "model.pt").read_bytes()
    train.main(["--out", str(copy), "--resume"])        # its config.json still says --overwrite
    assert (copy / "model.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"ch_mult": [1], "warmup": 0.03}'])
def test_a_configuration_that_is_damaged_or_of_an_earlier_version_is_named(copy, content):
    """A traceback, or a run that goes on with other settings than it began with."""
    put(copy / "config.json", content)
    assert f"{copy / 'config.json'}: " in end("--out", copy, "--resume")


def changed(path, **entries):
    old = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in {**old, **entries}.items() if v is not None}, path)


BROKEN = {
    "nothing": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(b"noise" * 50),
    "half": lambda path: path.write_bytes(path.read_bytes()[:-2000]),
    "a list": lambda path: torch.save([1], path),
    "another project": lambda path: torch.save({"state_dict": {}, "epoch": 3}, path),
    "another network": lambda path: changed(path, model={"x": torch.zeros(1)}),
    "code": lambda path: torch.save({"model": Evil(path.with_name("evil"))}, path),
    "an earlier version": lambda path: changed(path, format="nanoLiquid 1"),
    "no optimizer": lambda path: changed(path, model_optimizer=None),
    "no step": lambda path: changed(path, step=None),
}


@pytest.mark.parametrize("name", ["vqgan.pt", "model.pt"])
@pytest.mark.parametrize("damage", BROKEN)
def test_a_checkpoint_that_is_none_is_named_and_runs_no_code(few, copy, name, damage):
    """A traceback of the unpickler, a run that starts anew in silence, or a stranger's code."""
    BROKEN[damage](copy / name)
    left = (copy / name).read_bytes()
    assert f"{copy / name}: " in end("--out", copy, "--resume") and (copy / name).read_bytes() == left
    if damage not in ("no optimizer", "no step") and (damage, name) != ("an earlier version", "vqgan.pt"):
        with pytest.raises(SystemExit, match=f"{name}: "):      # sampling needs it, too
            sample.main(["text", "x", "--run", str(copy), "--device", "cpu"])
    assert not (copy / "evil").exists()


def test_a_tokenizer_that_did_not_make_the_codes_is_refused(few, copy):
    """Drawings are noise, without an error, as the vqgan.pt beside a model is another one."""
    changed(copy / "vqgan.pt", model={k: v + 1 for k, v in saved(copy, "vqgan.pt")["model"].items()})
    assert "another VQGAN" in end("--out", copy, "--resume")
    with pytest.raises(SystemExit, match="not the VQGAN whose codes"):
        sample.main(["t2i", "x", "--run", str(copy), "--device", "cpu"])


def test_an_evil_shard_is_made_again_and_runs_nothing(few, copy):
    """A stranger's code runs when a run is resumed, or a shard is so odd that it stops it."""
    path = copy / "codes" / "val-00000.pt"
    torch.save({"format": data.FORMAT, "rows": Evil(copy / "evil")}, path)
    train.main(["--out", str(copy), "--resume"])
    assert not (copy / "evil").exists() and len(torch.load(path, weights_only=True)["codes"]) == 8     # each scene and its edit


# -----------------------------------------------------------------------------------------------------------
# Disks, folders and files that fail

def test_a_full_disk_leaves_the_last_good_checkpoint(few, whole, tmp_path, monkeypatch):
    """A checkpoint of zeros, or a traceback that leaves one wondering what is lost."""
    def full(_):
        if (tmp_path / "model.pt").exists():
            raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = end(*flags(tmp_path))
    assert "model.pt: not written (No space left on device)" in said and "is whole: go on with" in said
    assert saved(tmp_path)["step"] == 3
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


def test_a_file_that_may_not_grow_leaves_the_old_one(tmp_path):
    """torch.save turns the disk's error into a RuntimeError, safetensors into one of its own."""
    data.save_atomically({"a": 1}, tmp_path / "x.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OSError, match="x.pt: not written .File too large., and left as it was"):
            data.save_atomically({"a": torch.zeros(100_000)}, tmp_path / "x.pt")
        with pytest.raises(OSError, match="export: weights not written"):
            Transformer(ModelConfig()).save_pretrained(tmp_path / "export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved(tmp_path, "x.pt") == {"a": 1} and len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_one_sentence(few, tmp_path):
    """Permissions, seen from any user: root may write everywhere, but not below a file."""
    file = put(tmp_path / "file", "x")
    assert "nothing was written" in end(*flags(file)) and "nothing was written" in end(*flags(file / "run"))
    put(tmp_path / "run" / "samples", "x")
    assert "samples" in end(*flags(tmp_path / "run")) and file.read_text() == "x"


OWN = dict(mix="t2i=1,i2t=1")


def test_data_that_vanish_end_the_run_in_one_sentence(tmp_path, monkeypatch):
    """A traceback out of a reader's thread, or a run that goes on with nothing."""
    source, out = own_pictures(tmp_path / "own"), tmp_path / "run"
    monkeypatch.setitem(TINY, "vq_steps", 20)       # more than is read ahead
    with monkeypatch.context() as patch:
        at_step(patch, 1, 5, lambda: source.rename(tmp_path / "gone"))
        assert str(source) in end(*flags(out, data=source, **OWN))
    assert saved(out, "vqgan.pt")["step"] >= 3
    (tmp_path / "gone").rename(source)
    train.main([*flags(out, data=source, **OWN), "--resume"])


# -----------------------------------------------------------------------------------------------------------
# Numbers that go wrong

def poison(patch, act, step, how):
    """In one step of training, the loss of what is drawn or all gradients are not finite."""
    owner, calls = {1: VQGAN, 3: Transformer}[act], itertools.count(1)
    forward = owner.forward

    def wrong(self, *args, **options):
        out = forward(self, *args, **options)
        if not self.training or len(args) < 2 or next(calls) != step:
            return out
        value = out.pixels if act == 1 else out
        if how == "loss":
            drawn = torch.tensor(True) if act == 1 else args[1] >= self.config.vocab_size
            value = value + torch.where(drawn, math.nan, 0.0)
        else:
            value.register_hook(lambda g: g * math.inf)
        return out._replace(pixels=value) if act == 1 else value
    patch.setattr(owner, "forward", wrong)


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("act, name, loss", [(1, "vqgan.pt", "the loss of the tokenizer"),
                                             (3, "model.pt", "t2i")])
def test_a_step_that_is_not_finite_stops_the_run(few, whole, tmp_path, monkeypatch, act, name, loss, how):
    """A checkpoint full of NaN over the last good one, found days later; or a message that names no task."""
    with monkeypatch.context() as patch:
        poison(patch, act, 5, how)
        said = end(*flags(tmp_path))
    assert f"act {act}, step 5: {loss if how == 'loss' else 'the gradient'}" in said
    assert f" not finite; {tmp_path / name} holds the last good one" in said and "text" not in said
    assert saved(tmp_path, name)["step"] == 3
    run(tmp_path, resume=True)
    same_run(whole, tmp_path)


# -----------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("flag, value", [
    ("steps", 0), ("steps", -5), ("rows", 0), ("rows", 10 ** 30), ("vq_batch", 0), ("save_every", 0),
    ("heads", 0), ("heads", 3), ("hidden_size", 30), ("device", "abacus"), ("train", "rows"), ("context", 9),
    ("image_size", 50), ("patch", 0), ("codes", 0), ("seed", -1), ("lr", "nan"), ("lr_rows", -1), ("ch", 30),
    ("lr_adam", "inf"), ("ch_mult", "0"), ("accumulate", 3), ("eval_n", -1), ("adversarial", -1),
    ("withheld", 24), *(("mix", x) for x in ("t2i", "t2i=-1", "t2i=nan", "text=inf", "draw=1", "t2i=0")),
    ("vqgan", "nowhere"), ("init", "nowhere"), ("data", "nowhere"), ("text", "nowhere.txt")])
def test_a_flag_out_of_range_is_named_before_anything_is_written(few, tmp_path, flag, value):
    """Hours of the first act before the third one finds a typing error."""
    said = end(*flags(tmp_path / "run", **{flag: value}))
    assert flag in said or str(value).startswith("nowhere") and str(value) in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv, words", [
    (["--steps", "abc"], "--steps"), (["--preset", "huge"], "--preset"), (["--ch_mult", "1,x"], "--ch_mult"),
    (["--stepps", "3"], "--stepps"), (["--optimizer", "adam"], "--optimizer"), (["--perceptual", "x"], "x")])
def test_a_flag_of_the_wrong_type_is_an_error(argv, words, capsys):
    """A typing error is passed over, and the run is not the one that was asked for."""
    assert end(*argv) == "2" and words in capsys.readouterr().err


def encoded(*grids):
    return "".join(json.dumps(dict(text="t", vqcode_512=[top] * n)) + "\n" for n, top in grids)


GOOD = '{"image": "own/0.png", "text": "a"}\n'
BAD = {
    "a folder without pictures": ("empty/notes.txt", "x", "no pictures"),
    "a broken line": ("x.jsonl", GOOD + "{\n", "x.jsonl, line 2: not JSON"),
    "only empty captions": ("x.jsonl", GOOD.replace('"a"', '" "'), "nothing has a caption or a question"),
    "a list of pictures that are not there": ("x.jsonl", GOOD.replace("own", "off") * 4, "could be read: "),
    "codes without their tokenizer": ("codes.jsonl", encoded((16, 3)) * 3, "--vqgan"),
    "codes of two grids": ("vqgan.jsonl", encoded((16, 3), (9, 3)) * 6, "codes (3, 3) up to 3 are not of"),
    "codes of a larger codebook": ("vqgan.jsonl", encoded((16, 99)) * 6, "codes (4, 4) up to 99 are not of"),
    "a tar that is none": ("x.tar", b"noise" * 500, "x.tar: not a readable tar file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_one_sentence_that_names_the_place(whole, tmp_path, name):
    """A traceback, or training on the rest, where one of somebody's many files is wrong."""
    place, content, words = BAD[name]
    own_pictures(tmp_path / "own")
    put(tmp_path / place, content)
    options = dict(vqgan=whole / "vqgan.pt") if place == "vqgan.jsonl" else {}
    assert words in end(*flags(tmp_path / "run", data=tmp_path / Path(place).parts[0], **OWN, **options))
    assert not (tmp_path / "run" / "model.pt").exists() and not list((tmp_path / "run").glob("codes/*"))


def test_a_run_among_its_own_data_is_refused(tmp_path):
    """Drawings of the model become its training pictures."""
    source = own_pictures(tmp_path / "own")
    for out in (source, source / "runs" / "x"):
        assert "--out" in end(*flags(out, data=source, **OWN))
    assert not (source / "runs").exists() and len(list(source.iterdir())) == 16


def test_enormous_captions_are_left_out_and_counted(tmp_path, capsys):
    """A run ends at its first samples/, drawn from a caption that nothing can read, or no two count alike."""
    source = own_pictures(tmp_path / "own", 9)
    for i in range(9):
        put(source / f"{i}.txt", "a circle" if i == 4 else "word " * 1000)
    for name in ("a", "b"):
        run(tmp_path / name, data=str(source), **OWN)
    log = log_of(tmp_path / "a")
    assert log == log_of(tmp_path / "b") and any(line.get("dropped") for line in log)
    assert not any(line.get(f"val_{task}") == 0 for line in log for task in data.TASKS)
    assert "longer than --context" in capsys.readouterr().out


def test_pictures_without_captions_or_files_are_scored(tmp_path):
    """Scores, after all the training, of captions that nobody gave or of pictures that are codes alone."""
    source, options = own_pictures(tmp_path / "own"), {"eval_n": 4, "mix": "t2i=1,vqa=1"}
    for i in range(8):
        (source / f"{i}.txt").unlink()
        put(source / f"{i}.json", json.dumps({"qa": [["what?", "a circle"]]}))
    asked = run(tmp_path / "run", data=str(source), **options)
    codes = put(tmp_path / "codes.jsonl", encoded((16, 0)) * 4)
    coded = run(tmp_path / "next", data=str(codes), vqgan=str(tmp_path / "run" / "vqgan.pt"), **options)
    assert asked["caption_exact"] is coded["caption_exact"] is None and coded["n"] == 0 and asked["n"] > 0


def header(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    put(folder / "config.json", json.dumps({k: v for k, v in config.items() if v is not None}))


UNFIT = {
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no .safetensors"),
    "a pointer to a large file": (lambda f: put(f / "model.safetensors", "version https://git-lfs"), "weights"),
    "half a download": (lambda f: put(f / "model.safetensors", (f / "model.safetensors").read_bytes()[:-9]), "weights"),
    "a missing shard": (lambda f: (f / "model.safetensors").rename(f / "model-1.safetensors") and put(
        f / "model.safetensors.index.json", '{"weight_map": {"x": "model-2.safetensors"}}'), "model-2"),
    "an adapter": (lambda f: [(f / "model.safetensors").rename(f / "adapter_model.safetensors"),
                              (f / "config.json").unlink()], "config.json"),
    "quantized weights": (lambda f: header(f, quantization_config={"quant_method": "fp8"}), "quantization_config"),
    "other layers": (lambda f: header(f, num_hidden_layers=2, layer_types=None), "layers.1"),
    "other widths": (lambda f: header(f, intermediate_size=52), "gate_proj"),
    "no end": (lambda f: header(f, eos_token_id=None) or header(f, pad_token_id=-1) or (
        f / "generation_config.json").unlink(), "eos_token_id"),
    "an end outside": (lambda f: header(f, eos_token_id=270), "no row for id 270"),
    "fewer rows than words": (lambda f: header(f, vocab_size=200), "no row for id 25"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_will_not_load_is_refused_before_the_first_act(few, tmp_path, name):
    """Days of the first two acts, and then a sentence about the third one's files."""
    folder, (damage, words) = published(tmp_path / "hf", True), UNFIT[name]
    header(folder, pad_token_id=-1)         # which means none
    damage(folder)
    assert words in end(*flags(tmp_path / "run", init=folder)) and not (tmp_path / "run").exists()


def test_an_extended_model_goes_on_with_its_image_rows(few, tmp_path):
    """Learned image rows become words, and random ones follow them; or codes of another tokenizer are trusted."""
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "hf"
    options = dict(image_rows="free", code_noise=0.0, optimizer="adamw")
    run(first, init=str(published(tmp_path / "qwen", True)), **options)
    sample.main(["export", str(out), "--run", str(first), "--device", "cpu"])
    assert "--vqgan" in end(*flags(second, init=out))
    changed(first / "vqgan.pt", model={k: v + 1 for k, v in saved(first, "vqgan.pt")["model"].items()})
    assert "--vqgan" in end(*flags(second, init=out, vqgan=first / "vqgan.pt")) and not second.exists()
    run(second, init=str(out), vqgan=str(out / "vqgan.pt"), lr_adam=1e-9, **options)
    assert saved(first)["vocab"] == saved(second)["vocab"]
    for name, weight in saved(first)["model"].items():
        torch.testing.assert_close(saved(second)["model"][name], weight, atol=1e-5, rtol=0)


def test_a_run_knows_its_data_from_everywhere_and_where_they_are_now(tmp_path, monkeypatch):
    """Scores of another data set of the same name, or a run that is lost because its pictures were moved."""
    monkeypatch.chdir(own_pictures(tmp_path / "own").parent)
    train.main(flags("run", data="own", text="own/0.txt", **OWN))
    train.main(["--resume", "--out", "run", "--data", "own"])
    (tmp_path / "own").rename(tmp_path / "moved")
    own_pictures(tmp_path / "else" / "own", 3)
    monkeypatch.chdir(tmp_path / "else")
    score = ["eval", "--run", "../run", "--device", "cpu", "--n", "1"]
    with pytest.raises(SystemExit, match=str(tmp_path / "own")):
        sample.main(score)
    assert str(tmp_path / "own") in end("--resume", "--out", "../run")
    monkeypatch.chdir(tmp_path / "moved")
    put(tmp_path / "own" / "0.txt", "text")
    train.main(["--resume", "--out", "../run", "--data", "../moved"])
    sample.main([*score, "--data", "."])


def test_drawings_of_something_else_are_not_taken_for_these(whole, tmp_path, monkeypatch):
    """Pictures of another prompt list, seed, setting or run; numbers that slip at a blank line; one prompt in the way."""
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(whole, Path("other"))
    changed(other / "model.pt", model={k: v + 1 for k, v in saved(other)["model"].items()})
    put(Path("p.txt"), "one\n\nthree \u2028 still three\n" + "long " * 300 + "\nfive")
    put(Path("q.txt"), "one\n\nother")
    draw = ["t2i", "--prompts", "p.txt", "--run", str(whole), "--device", "cpu"]
    for _ in range(2):
        with pytest.raises(SystemExit, match="p.txt: too long, not drawn: lines .4"):
            sample.main(draw)
        assert sorted(file.name for file in Path("drawn").glob("*.png")) == ["00000.png", "00002.png", "00004.png"]
        Path("drawn/00002.png").unlink()        # drawn again
    for more in (["--seed", "1"], ["--guidance", "3"], ["--prompts", "q.txt"], ["--run", "other"]):
        with pytest.raises(SystemExit, match="drawn: drawings of another"):
            sample.main([*draw, *more])
    Path("drawn/.drawn.json").unlink()
    with pytest.raises(SystemExit, match="drawn: drawings of another"):
        sample.main(draw)


def test_a_second_process_is_kept_out_of_a_run(tmp_path):
    """A run that was thought dead is resumed, and two processes write one checkpoint and one log."""
    out = tmp_path / "run"
    first = launch(out, "time.sleep(0.1)", steps=300, save_every=1)
    while not (out / "vqgan.pt").exists():
        time.sleep(0.05)
    for extra in ("--resume", "--overwrite"):
        assert "another process is running in it" in launch(out, "", extra, steps=300, save_every=1).communicate()[0]
    first.kill()
    first.communicate()
    assert launch(out, "", "--resume", steps=300, save_every=1).wait() == 0


NAME = os.fsdecode(b"caf\xe9")


def test_a_strict_terminal_and_an_environment_of_somebody_else(tmp_path):
    """Acts 1 and 2 are lost to the name of one damaged file, or one process waits for three that never come."""
    source = own_pictures(tmp_path / "own")
    put(source / f"{NAME}.png", "noise")
    put(source / f"{NAME}.txt", "日本")
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii:strict", WORLD_SIZE="4")
    tail = dict(capture_output=True, text=True, env=env, cwd=tmp_path, timeout=100)
    script = [sys.executable, str(ROOT / "train.py"), *flags(tmp_path / "run", data=source, **OWN)]
    done = subprocess.run(script, **tail)
    assert done.returncode == 0 and "1 pictures could not be read" in done.stdout and "caf?" in done.stdout
    script = [sys.executable, str(ROOT / "sample.py"), "text", "日本", "--run", "run", "--device", "cpu"]
    done = subprocess.run(script, **tail)
    assert done.returncode == 0 and done.stdout.startswith("??")


@pytest.mark.parametrize("number", [INT, signal.SIGQUIT])
def test_ctrl_c_ends_sampling_in_one_line(whole, tmp_path, number):
    """A traceback, or a core file, for a key that everybody presses."""
    put(tmp_path / "p.txt", "one\n" * 4000)
    script = [sys.executable, str(ROOT / "sample.py"), "t2i", "--prompts", "p.txt", "--run", str(whole), "--batch", "1"]
    process = subprocess.Popen(script, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               env=dict(os.environ, TQDM_DISABLE="1"))
    while not (tmp_path / "drawn" / "00001.png").exists():
        time.sleep(0.05)
    process.send_signal(number)
    assert process.communicate()[1] == "sample.py: stopped\n" and process.returncode == 1


def test_an_extra_that_is_not_installed_is_named_with_its_command(few, tmp_path, monkeypatch):
    """An ImportError out of the middle of a file, or the command of another project."""
    put(tmp_path / "hf" / "model.safetensors", "")
    for package in ("transformers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    for init in (tmp_path / "hf", "owner/name"):
        assert 'pip install -e ".[pretrained]"' in end(*flags(tmp_path / "run", init=init))


@pytest.mark.parametrize("argv, words", [
    (["t2i", "word " * 500], "too long"), (["vqa", "x.png", "why " * 500], "too long"),
    (["text", "x", "--n", "0"], "--n 0"), (["text", "x", "--top-p", "0"], "--top_p"), (["t2i"], "--prompts"),
    (["t2i", "x", "--out", "nowhere/x.png"], "nowhere"), (["t2i", "x", "--out", "x.nothing"], ".nothing"),
    (["i2t", "nowhere.png"], "nowhere.png"), (["t2i", "x", "--vqgan", "nowhere.pt"], "nowhere.pt"),
    (["t2i", "--prompts", "x.png"], "x.png: not a readable UTF-8"), (["export", "p.txt"], "p.txt"),
    (["t2i", "--prompts", "p.txt", "--save-dir", "p.txt"], "p.txt")], ids=lambda x: str(x)[:30])
def test_sampling_errors_are_one_sentence(whole, tmp_path, monkeypatch, argv, words):
    """A traceback for a typing error, or a file that a command which failed has left."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "p.txt", "a\nb\n")
    data.draw(data.random_scene(random.Random(0))).save("x.png")
    with pytest.raises(SystemExit) as caught:
        sample.main([*argv, "--run", str(whole), "--device", "cpu"])
    assert words in str(caught.value.code) and "\n" not in str(caught.value.code)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.txt", "x.png"]


def test_a_damaged_layout_is_named(whole, tmp_path):
    """An export with a broken layout ends in a traceback that names no file."""
    pytest.importorskip("transformers")
    sample.main(["export", str(tmp_path), "--run", str(whole), "--device", "cpu"])
    for content in ("{", "[]", "{}", "null", '{"vocab": 3}'):       # Liquid's own folder has none
        put(tmp_path / sample.LAYOUT, content)
        with pytest.raises(ValueError, match=sample.LAYOUT):
            sample.load(tmp_path, device="cpu")


# -----------------------------------------------------------------------------------------------------------
# No code from files, and any bytes

FORBIDDEN = {"eval", "exec", "compile", "os.system", "os.popen", "pickle", "subprocess", "socket", "urllib",
             "requests", "http", "shelve", "marshal", "ftplib", "importlib.import_module", "torch.hub.load"}
SERVES = {"sample": {"http.server", "urllib.parse"}}        # `page --serve` answers; neither module asks
IMPORTED_BY_NAME = {"data": ["extra"], "model": ["pretrained_extra"]}       # extras, when they are asked for


def calls_in(tree):
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", ["vqgan", "model", "data", "sample", "train"])
def test_no_source_runs_code_from_a_file_or_reaches_for_the_network(name):
    """An unpickler that obeys strangers; a shell; a download that nobody asked for."""
    text = (ROOT / f"{name}.py").read_text()
    tree = ast.parse(text)
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {part.split(".")[0] for node in nodes
                for part in [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                if part not in SERVES.get(name, ())}
    served = [ast.unparse(node.args[0]) for function, node in calls_in(tree) if function.endswith("HTTPServer")]
    assert served == (["('127.0.0.1', port)"] if name in SERVES else [])         # this machine alone
    assert "http.client" not in text and "urllib.request" not in text
    called = {function for function, _ in calls_in(tree)}
    assert not FORBIDDEN & (imported | called) and "trust_remote_code" not in text
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    by_name = [f.name for f in functions if "__import__" in [function for function, _ in calls_in(f)]]
    assert by_name == IMPORTED_BY_NAME.get(name, []) and text.count("__import__") == len(by_name)
    loads = [ast.unparse(node) for function, node in calls_in(tree) if function in ("torch.load", "np.load")]
    assert all("weights_only=True" in load for load in loads)
    downloading = [f.name for f in functions if any("download" in function for function, _ in calls_in(f))]
    assert downloading == (["fetch"] if name == "data" else [])         # --init with the name of a repository


hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
KEYS = st.sampled_from("image text image_path text_prompt vqcode_512 conversations value caption qa".split())
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("[1, 2]")
SOME_JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) |
                         st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)
LINES = st.lists(SOME_JSON, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.binary(max_size=300) | LINES)
def test_readers_survive_any_bytes(tmp_path, content):
    """A traceback for somebody's strange file."""
    for name in ("x.txt", "x.jsonl", "x.tar", "x.png", "folder/x.txt", "folder/x.json", "tokenizer.json"):
        put(tmp_path / name, content)
    put(tmp_path / "folder" / "x.png", b"")
    for function, names in ((data.read_texts, "x.txt x.jsonl"), (data.read_pictures, "x.jsonl x.tar folder"),
                            (data.load_image, "x.png"), (VQGAN.load, "x.png"), (sample.read_model, "x.png"),
                            (data.PretrainedTokenizer.load, ".")):
        for name in names.split():
            try:
                function(tmp_path / name)
            except ValueError as error:
                assert str(error) and not isinstance(error, UnicodeError)
    assert data.read_shard(tmp_path / "x.png", "x") is None
