"""Each idea of blank.py against a plain reference on tiny inputs, and the blanks themselves.

A message says what to mend. Other tests with the same marker check the idea in its surroundings.
"""

import ast
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import blank
import data
import model as module
import sample
import train
from model import Cache, ModelConfig
from vqgan import Quantizer, VQGANConfig, nearest

VOCAB = data.Vocab.extend(300, 8, pad=0, bos=1, eos=2)              # 300 words, 8 codes, 4 marks


class Letters:
    """A tokenizer of one id a letter."""
    def encode(self, text):
        return [ord(letter) for letter in text]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    return torch.as_tensor(a).shape == torch.as_tensor(b).shape and torch.allclose(a, b, atol=1e-5)


# -----------------------------------------------------------------------------------------------------------
# The ideas, each against a loop or a formula

@pytest.mark.straight_through
@pytest.mark.parametrize("l2_norm", [False, True])
def test_straight_through(l2_norm):
    """An encoder that learns nothing from the decoder, or learns too fast for its codebook."""
    quantizer, beta = Quantizer(VQGANConfig(n_embed=4, embed_dim=3, l2_norm=l2_norm, beta=0.25)), 0.25
    quantizer.embedding.weight.data = numbers(4, 3)
    z, pull = numbers(1, 3, 1, 5, seed=1).requires_grad_(), numbers(1, 3, 1, 5, seed=2)
    before, book = quantizer.project(z), quantizer.codebook()
    rows = [min(range(4), key=lambda k: (before[0, :, 0, i] - book[k]).norm()) for i in range(5)]
    rounded = book[rows].T[None, :, None]                           # (1, 3, 1, 5)
    z_q, codes, loss = quantizer(z)
    assert codes.flatten().tolist() == rows, "codes must be the numbers of the nearest rows"
    assert close(z_q, rounded), "the decoder must see rows of the codebook, not the encoder's vectors"
    arrived, = torch.autograd.grad((z_q * pull).sum(), z, retain_graph=True, allow_unused=True)
    wanted, = torch.autograd.grad((before * pull).sum(), z, retain_graph=True)
    assert arrived is not None, "no gradient reaches z: codes have no slope, make a way past them"
    assert close(arrived, wanted), "the gradient of z_q must reach z as if nothing had been rounded"
    e = 3 if l2_norm else 1
    distance = e * (before - rounded).square().mean()
    assert close(loss, (1 + beta) * distance), \
        f"loss {float(loss):.4f}, not {float((1 + beta) * distance):.4f}: the mean squared distance of z " \
        "and z_q, once for the codebook and beta times for the encoder; with l2_norm times e"
    towards_z, = torch.autograd.grad(distance, quantizer.embedding.weight, retain_graph=True)
    moved, = torch.autograd.grad(loss, quantizer.embedding.weight, retain_graph=True)
    assert close(moved, towards_z), "the codebook's term, without beta, moves the codebook; detach z in it"
    towards_row, = torch.autograd.grad(e * (before - rounded.detach()).square().mean(), z)
    moved, = torch.autograd.grad(loss, z)
    assert close(moved, beta * towards_row), "only beta times the encoder's term moves z; detach z_q in it"


@pytest.mark.nearest_code
def test_nearest_code():
    """A long centre wins by its length, as |c|^2 or a sign is forgotten."""
    vectors, centres = numbers(20, 3), numbers(6, 3, seed=1) * torch.tensor([[1.], [1], [1], [1], [3], [9]])
    chosen = nearest(vectors, centres)
    assert chosen.shape == (20,) and chosen.dtype == torch.int64, "one integer for each vector"
    for v, k in zip(vectors, chosen.tolist()):
        distances = [math.dist(v.tolist(), c.tolist()) for c in centres]
        best = min(range(6), key=distances.__getitem__)
        assert k == best, f"centre {k} at distance {distances[k]:.2f} was chosen, centre {best} is at " \
                          f"{distances[best]:.2f}: compare |c|^2 - 2 v.c, and take the smallest"


@pytest.mark.code_to_id
def test_code_to_id():
    """A code takes the row of a word or a mark."""
    codes = torch.tensor([[0, 3], [7, 1]])
    ids = VOCAB.codes_to_ids(codes)
    assert torch.equal(ids, torch.tensor([[300, 303], [307, 301]])), \
        "300 words come first: code 0 is id 300, code 7 is id 307, and the grid keeps its shape"
    assert torch.equal(VOCAB.ids_to_codes(ids), codes), "ids_to_codes must give the same codes back"
    for outside in (-1, 8):
        try:
            ids = VOCAB.codes_to_ids([outside])
        except ValueError:
            continue
        pytest.fail(f"there are codes 0 to 7, but {outside} became {ids}: raise a ValueError, do not clamp")


@pytest.mark.t2i_template
def test_t2i_template():
    """A prompt for drawing that has another order than training had, or a drawing without its end."""
    words, codes = Letters().encode("a dog" + data.DRAW), torch.tensor([[3, 0], [7, 1]])
    drawing = [303, 300, 307, 301, VOCAB.eoi, VOCAB.eos]
    for caption, middle in (("a dog", words), (None, [VOCAB.uncond])):
        prompt = [VOCAB.bos, *middle, VOCAB.boi]
        assert data.render_t2i(VOCAB, Letters(), caption)[0] == prompt, \
            f"caption {caption}: without codes it is bos, caption + DRAW (or <unconditional> alone), <boi>"
        ids, targets = data.render_t2i(VOCAB, Letters(), caption, codes)
        assert ids[:len(prompt)] == prompt, "training must begin with exactly the prompt of sampling"
        assert ids[len(prompt):] == drawing, "then come the codes' ids row by row, <eoi> and eos"
        wanted = [data.IGNORE] * (len(prompt) - 1) + drawing + [data.IGNORE]
        assert targets == wanted, "<boi> predicts the first code, and so on to eos; nothing before is learned"


@pytest.mark.packed_rows
def test_packed_rows():
    """An example reads its neighbour in the row, or the future."""
    documents, every = torch.tensor([[0, 0, 1, 1, 1, -1, -1]]), torch.arange(7)
    for window in (None, 2):
        seen = module.mask_mod(documents, None, window)(torch.tensor(0), 0, every[:, None], every)
        for q in range(7):
            for k in range(7):
                a, b = documents[0, q].item(), documents[0, k].item()
                wanted = q == k or a == b >= 0 and k < q and (window is None or q - k < window)
                assert seen[q, k] == wanted, f"query {q} of example {a} must {'' if wanted else 'not '}see " \
                    f"key {k} of example {b} (-1 is padding), window {window}"
    seen = module.mask_mod(padding=torch.tensor([2]))(torch.tensor(0), 0, every[:, None], every)
    for q in range(7):
        for k in range(7):
            wanted = q == k or 2 <= k < q
            assert seen[q, k] == wanted, f"slots 0 and 1 are empty (padding 2): query {q} must " \
                f"{'' if wanted else 'not '}see key {k}"


@pytest.mark.rotary
def test_rotary():
    """Other pairs or another direction than those of published weights."""
    def turned(x, position):                                        # x (4,): two complex numbers
        pairs = [complex(x[i], x[i + 2]) * complex(math.cos(w * position), math.sin(w * position))
                 for i, w in enumerate((1.0, 0.1))]
        return [pair.real for pair in pairs] + [pair.imag for pair in pairs]

    def ours(x, position):
        angles = position * torch.tensor([1.0, 0.1, 1.0, 0.1])
        return module.rotate(x[None, None, None], angles.cos(), angles.sin())[0, 0, 0]
    q, k = numbers(4), numbers(4, seed=1)
    assert close(ours(q, 0), q), "at position 0 nothing turns"
    for position in (1, 5):
        assert close(ours(q, position), torch.tensor(turned(q.tolist(), position))), \
            "x[i], x[i + d/2] are a + ib, to multiply by cos + i sin: a cos - b sin, and then a sin + b cos"
    assert close(ours(q, 9) @ ours(k, 7), ours(q, 2) @ ours(k, 0)), "a product knows only the distance"


@pytest.mark.table_logits
def test_table_logits():
    """A code gets the logit of its neighbour, at the border of the table's parts or in a range."""
    table = module.Table(ModelConfig(vocab_size=5, image_rows=4, hidden_size=3))
    table.weight.data, table.image_rows.weight.data = numbers(5, 3), numbers(4, 3, seed=1)
    rows, x = [*table.weight, *table.image_rows.weight], numbers(2, 3, seed=2)
    for wanted in (None, (0, 9), (3, 7), (5, 9), (6, 8), (0, 2)):
        first, past_last = wanted or (0, 9)
        loop = torch.tensor([[(v @ rows[r]).item() for r in range(first, past_last)] for v in x])
        logits = table.logits(x, wanted)
        assert logits.shape == loop.shape, f"rows {wanted}: {logits.shape[-1]} logits, not " \
            f"{loop.shape[-1]}; 5 rows of words come first, then 4 of images"
        assert close(logits, loop), f"rows {wanted}: logit i must be x times row {first} + i of the table"


@pytest.mark.answer_loss
def test_answer_loss():
    """The model is taught to ask, or each target stands one place off."""
    codes, skip = torch.tensor([[3, 0], [7, 1]]), data.IGNORE
    parts = ([VOCAB.bos], False), ("hi", False), (codes, True), ([VOCAB.eoi], False), ("no", True)
    ids, targets = data.sequence(VOCAB, Letters(), *parts)
    whole = [VOCAB.bos, *b"hi", 303, 300, 307, 301, VOCAB.eoi, *b"no"]
    assert ids == whole, "words are encoded, codes become ids in raster order, ids stay; one behind the other"
    assert len(targets) == len(ids), "each position has a target; the last has none to predict, so IGNORE"
    for t, wanted in enumerate([skip, skip, 303, 300, 307, 301, skip, *b"no", skip]):
        assert targets[t] == wanted, \
            f"targets[{t}] is {targets[t]}, not {wanted}: the id at {t + 1} if it is learned, else IGNORE"


@pytest.mark.guidance
def test_guidance():
    """Guidance leads away from the prompt, or prompts are mixed with negatives."""
    c, u = numbers(3, 5), numbers(3, 5, seed=1)
    logits = torch.cat([c, u])                                      # prompts, then negatives
    assert close(sample.guide(logits, 1.0), c), "with scale 1, guidance must return the conditional logits"
    assert close(sample.guide(logits, 0.0), u), "with scale 0, the prompt must have no effect"
    for scale in (0.5, 3.0):
        loop = torch.tensor([[u[i, j] + scale * (c[i, j] - u[i, j]) for j in range(5)] for i in range(3)])
        assert close(sample.guide(logits, scale), loop), \
            f"scale {scale}: from the unconditional logits, {scale} times the way to the conditional ones"


@pytest.mark.top_k_top_p
@pytest.mark.parametrize("options, kept", [
    ({}, "0123"), ({"temperature": 2.0}, "0123"), ({"temperature": 0}, "1"), ({"top_k": 2}, "13"),
    ({"top_p": 0.7}, "13"), ({"top_p": 0.4}, "1"), ({"top_k": 3, "top_p": 0.85}, "013")])
def test_top_k_top_p(options, kept):
    """A token that should be out is drawn, or those that stay are drawn in another proportion."""
    n, p = 400, [0.15, 0.5, 0.05, 0.3]
    weights = [x ** (1 / (options.get("temperature") or 1)) * (str(i) in kept) for i, x in enumerate(p)]
    chosen = sample.choose(torch.tensor([p]).log().expand(n, 4), torch.arange(n) / n, **options)
    assert chosen.shape == (n,), "one choice for each row of logits"
    share = (chosen.bincount(minlength=4) / n).tolist()
    assert share == pytest.approx([w / sum(weights) for w in weights], abs=0.006), \
        f"{options or 'no options'}: of the probabilities {p}, tokens {', '.join(kept)} stay, in " \
        "proportion (the likeliest first; top_p keeps the one that reaches p, too)"


@pytest.mark.schedule
def test_schedule():
    """A first step at full speed, or a last one that still moves."""
    def rate(step):
        return train.schedule(step, 200, decay=0.5, warmup=0.1)
    for step in range(20):
        assert rate(step) == pytest.approx((step + 1) / 20), f"step {step}: 20 equal steps to 1, not from 0"
    for step in range(20, 101):
        assert rate(step) == pytest.approx(1), f"step {step}: from warm-up to the fall, the rate is 1"
    for step in range(100, 201):
        wanted = (1 + math.cos(math.pi * (step - 100) / 100)) / 2
        assert rate(step) == pytest.approx(wanted, abs=1e-9), f"step {step}: half a cosine, from 1 to 0"
    assert train.schedule(0, 200, warmup=0.0) == pytest.approx(1), "without warm-up, begin at 1"


@pytest.mark.cache
@torch.no_grad()
def test_cache():
    """A step forgets what was read, or computes keys of a position that is not the token's."""
    config = ModelConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    torch.manual_seed(0)
    layer, x, keys, values = module.Attention(config, 1), numbers(1, 5, 8), [], []
    cos, sin = module.rope_angles(config, torch.arange(5)[None], False)             # (1, 1, 5, 4)
    cache, every = Cache(config, 1, 6), torch.arange(6)                             # a slot to spare
    for slots in (every[:3], every[3:4], every[4:5]):       # a prompt of three tokens, then one by one
        mask = (every <= slots[:, None])[None, None]
        y = layer(x[:, slots], (cos[:, :, slots], sin[:, :, slots]), mask, slots, cache)
        assert y.shape == (1, len(slots), 8), "a step returns one vector for each of its new tokens"
        for t, out in zip(slots.tolist(), y[0]):
            place = cos[:, :, t:t + 1], sin[:, :, t:t + 1]
            q = module.rotate(layer.q_norm(layer.q_proj(x[0, t]).view(1, 2, 1, 4)), *place)[0, :, 0]
            keys.append(module.rotate(layer.k_norm(layer.k_proj(x[0, t]).view(1, 1, 1, 4)), *place).view(4))
            values.append(layer.v_proj(x[0, t]))
            heads = [sum(w * v for w, v in zip((torch.stack(keys) @ head * layer.scale).softmax(0), values))
                     for head in q]                         # two heads share the keys and values
            assert close(cache.k[1][0, 0, t], keys[t]), f"cache.k[layer] must hold rotated keys; see slot {t}"
            assert close(cache.v[1][0, 0, t], values[t]), f"cache.v[layer] must hold the value at slot {t}"
            assert close(out, layer.o_proj(torch.cat(heads))), \
                f"token {t} must attend to tokens 0 to {t}, those of earlier steps from the cache"
    assert not cache.k[0].any() and not cache.k[1][:, :, 5].any(), "other layers and slots stay as they are"


# -----------------------------------------------------------------------------------------------------------
# The blanks

FILES = sorted({idea.file for idea in blank.IDEAS.values()})


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The files and the tests, in a folder that may be changed."""
    for name in (*FILES, "pyproject.toml", "README.md"):
        shutil.copy(blank.ROOT / name, tmp_path)
    for folder in ("tests", "assets"):
        shutil.copytree(blank.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(blank, "ROOT", tmp_path)
    return tmp_path


def test_every_blank_keeps_signature_and_docstring_and_has_tests_and_comes_back(copy, capsys):
    """A function was renamed, a marker is unknown to pytest, or a file does not come back as it was."""
    blank.main(["--list"])
    assert capsys.readouterr().out.split() == list(blank.IDEAS) and len(blank.IDEAS) >= 10
    markers = re.findall(r'"(\w+): .*tests/blank.py', (copy / "pyproject.toml").read_text())
    assert markers == list(blank.IDEAS)
    before = {name: (copy / name).read_bytes() for name in FILES}

    def head(idea):
        node = blank.find(idea)[2]
        return ast.unparse(node.args), ast.get_docstring(node), len(node.body) - bool(ast.get_docstring(node))
    for idea in blank.IDEAS.values():
        *signature, size = head(idea)
        for _ in range(2):                                          # the second time nothing changes
            blank.main([idea.name])
        printed = capsys.readouterr().out
        assert head(idea) == (*signature, 1) and "test_blank.py: test_" in printed and idea.source in printed
        assert max(map(len, (copy / idea.file).read_text().splitlines())) <= 110
    for name in reversed(blank.IDEAS):
        blank.main([name, "--back"])
    assert before == {name: (copy / name).read_bytes() for name in FILES}
    assert not any((copy / "blanks").iterdir())


def test_nothing_of_a_student_is_lost(copy, capsys):
    """An evening's body is overwritten by a blank or by the project's, or is taken for the project's."""
    file, kept = copy / "sample.py", copy / "blanks" / "guidance.mine1.py"
    project = file.read_text()

    def refused(*argv, message):
        before = {path: path.read_bytes() for path in copy.rglob("*.py")}
        with pytest.raises(SystemExit, match=message):
            blank.main([*argv])
        assert before == {path: path.read_bytes() for path in copy.rglob("*.py")}
    refused("guidance", "--back", message="nothing was put away")
    for mine in (kept, kept.with_name("guidance.mine2.py")):
        blank.main(["guidance"])
        empty = file.read_text()
        own = re.sub(r"raise NotImplementedError\((.|\n)*?\"\)", f"return logits  # {mine.name}", empty)
        file.write_text(own)
        refused("guidance", message="guidance --back` keeps it")
        file.write_text(own.replace("return logits", "return logits ) "))
        refused("guidance", "--back", message=r"sample.py, line \d+: unmatched")
        file.write_text(own.replace("def guide", "def guided"))
        refused("guidance", "--back", message="no guide")
        file.write_text(own)
        blank.main(["guidance", "--back"])
        assert file.read_text() == project and mine.name in mine.read_text()
        assert mine.name in capsys.readouterr().out
    assert "guidance.mine1.py" in kept.read_text()


@pytest.mark.slow
def test_every_blank_is_red_and_every_project_body_green(copy):
    """A test that passes without the idea that it speaks of, or that cannot even be collected."""
    def run(*argv):
        done = subprocess.run([sys.executable, *argv], cwd=copy, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    for name in blank.IDEAS:
        assert run("tests/blank.py", name)[0] == 0
        code, printed = run("-m", "pytest", "-m", name, "--tb=line", "-p", "no:cacheprovider")
        assert code == 1 and "error" not in printed.splitlines()[-1] and " passed" not in printed, printed
        assert run("tests/blank.py", name, "--back")[0] == 0
    code, printed = run("-m", "pytest", "-m", " or ".join(blank.IDEAS), "-p", "no:cacheprovider")
    assert code == 0, printed
