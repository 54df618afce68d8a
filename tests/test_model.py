"""The transformer on its own: loss, masks, cache and the extended table."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention

import model as module
from model import NLL, Cache, ModelConfig, Transformer, flex_runs

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
SHAPES = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa, wide heads": {"num_key_value_heads": 1, "head_dim": 12},
    "windows": {"num_key_value_heads": 2, **SLIDING},
    "gemma2": {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2, **SLIDING,
               "query_pre_attn_scalar": 5, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", "num_key_value_heads": 2, **SLIDING, "rope_local_base_freq": 50.0,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}
everywhere = pytest.mark.parametrize("name", SHAPES)
BOOK = {"vocab_size": 30, "image_rows": 20, "codebook": (16, 5)}        # 16 codes, then 4 marks
UNTIED = {"tie_word_embeddings": False}


def tiny(**options):
    """A random model, far from its start, where mistakes would hide behind small numbers."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    model = Transformer(ModelConfig(**sizes | options))
    for table in model.tables if options.get("codebook") else []:
        table.image_rows.start(torch.randn(options["codebook"]))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def draw(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# -----------------------------------------------------------------------------------------------------------
# The loss

@pytest.mark.parametrize("chunk, softcap, z_loss", [(512, None, 0.0), (4, 2.0, 0.0), (3, 2.0, 0.1)])
def test_nll_is_cross_entropy(monkeypatch, chunk, softcap, z_loss):
    """The hand-written gradient drops a factor, a chunk or a part of the table."""
    monkeypatch.setattr(NLL, "CHUNK", 1)
    monkeypatch.setattr(NLL, "LEAST", chunk)
    torch.manual_seed(0)
    x, words, rows = (torch.randn(n, 8, requires_grad=True) for n in (10, 30, 20))
    targets = draw(10)
    z = x @ torch.cat([words, rows]).T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    wanted = F.cross_entropy(z, targets, reduction="none") + z_loss * z.logsumexp(-1) ** 2
    nll = NLL.apply(x, targets, z_loss, softcap, words, rows)
    close(nll, wanted)
    ours, theirs = (torch.autograd.grad(3 * y.sum(), (x, words, rows)) for y in (nll, wanted))
    close(ours, theirs)

    nll = NLL.apply(x, targets, z_loss, softcap, words.detach(), rows)         # only the image rows learn
    close(torch.autograd.grad(3 * nll.sum(), (x, rows)), theirs[::2])


def test_nll_refuses_what_its_gradient_does_not_know():
    """Unequal weights get the gradient of equal ones; a second backward pass scales the first's gradient."""
    x, table = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8)
    with pytest.raises(RuntimeError, match="must weigh the same"):
        (NLL.apply(x, draw(3), 0.0, None, table) * torch.tensor([1.0, 1.0, 2.0])).sum().backward()
    loss = NLL.apply(x, draw(3), 0.0, None, table).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()


def test_targets():
    """Positions without a target carry loss, or a batch without any gives nan."""
    model, ids, targets = tiny(), draw(3, 7), draw(3, 7, seed=2)
    targets[0] = -100
    targets[1, ::2] = -100
    nll = model(ids, targets=targets)
    close(nll, F.cross_entropy(model(ids).mT, targets, reduction="none"))
    nothing = model(ids, targets=torch.full_like(ids, -100)).sum()
    nothing.backward()
    assert nothing == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
    assert model.bfloat16()(ids, targets=targets).dtype == torch.float32


def test_bf16_autocast_trains_with_nearly_the_gradients_of_float32():
    """The loss's own backward runs outside autocast: mixed types would raise there."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(hidden_size=32, num_hidden_layers=1, head_dim=8, **BOOK))
    model.model.embed_tokens.image_rows.start(torch.randn(16, 5))
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)        # blocks start as the identity
    ids, grads = draw(2, 9), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            nll = model(ids, targets=ids)
        nll.mean().backward()
        grads.append({name: p.grad.clone().flatten() for name, p in model.named_parameters()})
    assert nll.dtype == torch.float32
    for name, exact in grads[0].items():
        assert F.cosine_similarity(exact, grads[1][name], dim=0) > 0.98, name


# -----------------------------------------------------------------------------------------------------------
# Masks and the cache

@pytest.mark.packed_rows
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("flex", [False, True], ids=["mask", "flex"])
@everywhere
@torch.no_grad()
def test_packed_rows_equal_examples_alone(monkeypatch, name, flex):
    """A packed example sees its neighbour or starts elsewhere; FlexAttention's eager code stands for GPUs."""
    monkeypatch.setattr(module, "flex_runs", lambda device, head_dim: flex)
    monkeypatch.setattr(module, "flex", lambda name: getattr(flex_attention, name))
    model, lengths = tiny(**SHAPES[name]), (130, 1, 60, 9)          # several blocks of 128
    parts = [draw(n, seed=n) for n in lengths]
    documents = torch.repeat_interleave(torch.tensor([0, 1, 2, -1]), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(torch.cat(parts)[None], positions=positions, documents=documents)[0]
    assert packed.isfinite().all()                                  # padding, too
    for logits, ids in zip(packed.split(lengths)[:3], parts):
        close(logits, model(ids[None])[0])


@pytest.mark.parametrize("device, major, kilobytes, head_dim, triton, wanted", [
    ("cpu", 8, 163, 128, True, False), ("cuda", 8, 163, 256, True, True), ("cuda", 8, 99, 256, True, False),
    ("cuda", 8, 99, 128, True, True), ("cuda", 7, 163, 128, True, False), ("cuda", 8, 163, 8, True, False),
    ("cuda", 8, 163, 128, False, False)])
def test_flex_runs_where_its_kernels_do(monkeypatch, device, major, kilobytes, head_dim, triton, wanted):
    """Training stops on an RTX 3090 with Gemma's wide heads, on a T4, or without Triton."""
    gpu = SimpleNamespace(major=major, shared_memory_per_block_optin=kilobytes * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(module, "find_spec", lambda name: triton or None)
    assert flex_runs(torch.device(device), head_dim) == wanted


@pytest.mark.cache
@everywhere
@torch.no_grad()
def test_cache_equals_no_cache(name):
    """Decoding sees other keys, positions or windows, the future, or what padding holds."""
    model, ids = tiny(**SHAPES[name]), draw(2, 12)
    wanted, cache = model(ids), Cache(model.config, 2, 15)          # with slots to spare
    close(torch.cat([model(part, cache=cache) for part in ids.split([5, 4, 1, 1, 1], dim=1)], dim=1), wanted)
    padded = torch.stack([F.pad(ids[0], (1, 0)), F.pad(ids[1, :9], (4, 0))])
    cache = Cache(model.config, 2, 13, padding=torch.tensor([1, 4]))
    logits = torch.cat([model(part, cache=cache) for part in padded.split([10, 1, 1, 1], dim=1)], dim=1)
    close(logits[0, 1:], wanted[0])
    close(logits[1, 4:], wanted[1, :9])


@everywhere
@torch.no_grad()
def test_tensors_are_made_where_the_arguments_are(name):
    """A mask or an angle left on the CPU would stop the first run on a GPU, for which meta stands here."""
    meta, model = torch.device("meta"), tiny(**SHAPES[name]).to("meta")
    ids, cache = draw(2, 9).to(meta), Cache(model.config, 2, 12, device=meta)
    made = model(ids), model(ids, documents=ids), model(ids, cache=cache), model(ids[:, :1], cache=cache)
    assert all(x.device == meta for x in made)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_normalised_queries_and_keys_keep_the_type_of_values(family):
    """Autocast leaves queries in float32 beside bf16 values, which FlexAttention refuses."""
    types, block = [], tiny(model_type=family).model.layers[0]
    for layer in (block.self_attn.q_norm, block.self_attn.k_norm, block.self_attn.v_proj):
        layer.register_forward_hook(lambda layer, x, y: types.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(1, 5, 32), torch.ones(2, 1, 1, 5, 8), None)
    assert types == [torch.bfloat16] * 3


# -----------------------------------------------------------------------------------------------------------
# The extended table

TABLES = pytest.mark.parametrize("options", [
    BOOK, BOOK | UNTIED, BOOK | {"codebook": None}, BOOK | UNTIED | {"codebook": None}],
    ids=["codebook", "codebook, untied", "free", "free, untied"])


@pytest.mark.table_logits
@TABLES
@torch.no_grad()
def test_a_table_in_parts_equals_one_table(options):
    """The row that an id reads is not the row of its logit, at the border or in a range of rows."""
    model = tiny(**options)
    whole = tiny(**options | {"vocab_size": 50, "image_rows": 0, "codebook": None})
    whole.load_state_dict(model.state_dict() | {
        name: torch.cat(table.parts())
        for name, table in zip(("model.embed_tokens.weight", "lm_head.weight"), model.tables)}, strict=False)
    ids, x = torch.arange(50)[None], torch.randn(2, 3, 32)
    close(model(ids), whole(ids))
    close(model(ids, targets=ids), whole(ids, targets=ids))
    for first, past_last in ((30, 46), (0, 30), (28, 33), (49, 50)):
        close(model.logits(x, (first, past_last)), whole.logits(x)[..., first:past_last])


@TABLES
def test_only_image_rows_learn(options):
    """`--train rows` moves a word, or leaves image rows or a head's as they were."""
    model = tiny(**options)
    for name, p in model.named_parameters():
        p.requires_grad_("image_rows" in name)
    before = [[part.detach().clone() for part in table.parts()] for table in model.tables]
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=0.1), torch.arange(50)[None]
    for _ in range(2):
        model(ids, targets=ids).sum().backward()
        optimizer.step()
    for (words, rows), table in zip(before, model.tables):
        assert torch.equal(table.weight, words) and (table.image_rows() != rows).any(1).all()


def test_rows_of_codes_follow_the_codebook():
    """Codes get each other's rows, marks move with the codebook, or what makes the rows learns nothing."""
    model = tiny(**BOOK)
    rows = model.model.embed_tokens.image_rows
    before = rows().detach()
    rows.codebook[3] += 1
    assert (rows() != before).any(1).nonzero().flatten().tolist() == [3]
    assert torch.equal(rows()[16:], rows.weight[16:])
    model(torch.arange(50)[None], targets=draw(1, 50)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in rows.parameters()) and not rows.codebook.requires_grad


@TABLES
@torch.no_grad()
def test_constant_rows(options):
    """Drawing runs the codebook's MLP in every step, or with old rows once training has gone on."""
    model, ids, calls = tiny(**options), torch.arange(50)[None], []
    wanted, names = model(ids), list(model.state_dict())
    rows = model.tables[-1].image_rows
    if rows.codebook is not None:
        rows.down.register_forward_hook(lambda *_: calls.append(1))
    with model.constant_rows():
        assert torch.equal(model(ids), wanted) and torch.equal(model(ids), wanted)
        assert len(calls) == (rows.codebook is not None) and list(model.state_dict()) == names
    for p in rows.parameters():
        p *= 1.5
    assert not torch.allclose(model(ids), wanted)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extended_vocabulary(tied, dtype):
    """Growing changes the words, gives every code the same row or one unlike words, or forgets the head."""
    model, ids = tiny(tie_word_embeddings=tied).to(dtype), draw(1, 9)
    old, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(ids)
    model.extend_vocab(15, torch.Generator().manual_seed(0))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in old.items())
    assert torch.equal(model(ids)[..., :50], logits) and model(ids).shape == (1, 9, 65)
    for table in model.tables:
        rows, words = table.image_rows(), table.weight.float()
        assert rows.dtype == dtype and rows.requires_grad and len(rows.unique(dim=0)) == 15
        assert ((rows - words.mean(0)).abs() < 0.1 * words.std(0) + 0.01).all()
    with pytest.raises(ValueError, match="15 image rows already"):
        model.extend_vocab(1)
