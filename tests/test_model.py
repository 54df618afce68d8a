"""The transformer on its own: losses, masks, caches, the table and its growth."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention

import model
from model import Cache, ChunkedNLL, ModelConfig, Transformer, attend, block_mask, visible

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
SHAPES = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa, wide heads": {"num_key_value_heads": 1, "head_dim": 12},
    "windows": {"num_key_value_heads": 2, **SLIDING},
    "gemma2": {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2, "head_dim": 12, **SLIDING,
               "query_pre_attn_scalar": 5, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", "num_key_value_heads": 2, **SLIDING, "rope_local_base_freq": 50.0,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}
everywhere = pytest.mark.parametrize("name", SHAPES)


def tiny(**options):
    """A random model, far from its start, where mistakes would hide behind small numbers."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                                       "num_attention_heads": 4, "head_dim": 8, **options}))
    if options.get("codebook_dim"):
        model.model.image_rows.start(torch.randn(options["codebook_size"], options["codebook_dim"]))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def draw(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 512])      # the last: all 10 at a time
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_chunked_loss_is_cross_entropy(monkeypatch, chunk, softcap, z_loss):
    """The hand-written backward pass drops a factor or a chunk."""
    monkeypatch.setattr(ChunkedNLL, "CHUNK", 1)
    monkeypatch.setattr(ChunkedNLL, "LEAST", chunk)
    torch.manual_seed(0)
    x, table = (torch.randn(n, 8, dtype=torch.double, requires_grad=True) for n in (10, 50))
    targets, weights = draw(10), torch.rand(10)
    z = x @ table.T if softcap is None else softcap * torch.tanh(x @ table.T / softcap)
    wanted = F.cross_entropy(z, targets, reduction="none") + z_loss * z.logsumexp(-1) ** 2
    nll = ChunkedNLL.apply(x, table, targets, z_loss, softcap)
    close(nll, wanted.float())
    for w in (3.0, 3.0, weights):       # twice, for the gradients that forward took are given away once
        ours, theirs = (torch.autograd.grad((y * w).sum(), (x, table), retain_graph=True) for y in (nll, wanted))
        close(ours, theirs)
    with_weights = torch.autograd.grad((ChunkedNLL.apply(x, table, targets, z_loss, softcap) * weights).sum(), (x, table))
    close(with_weights, theirs)


def test_targets():
    """Positions without a target carry loss, or a batch without any gives nan."""
    model, ids, targets = tiny(), draw(3, 7), draw(3, 7, seed=2)
    targets[0] = -100
    targets[1, ::2] = -100
    nll = model(ids, targets=targets)
    assert nll.dtype == torch.float32 and nll.shape == ids.shape
    assert (nll[targets == -100] == 0).all() and (nll[targets != -100] > 0).all()
    close(nll, F.cross_entropy(model(ids).mT, targets, reduction="none"))
    nothing = model(ids, targets=torch.full_like(ids, -100)).sum()
    nothing.backward()
    assert nothing == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
    assert model.bfloat16()(ids, targets=targets).dtype == torch.float32


@everywhere
def test_packed_rows_equal_examples_alone(name):
    """An example sees its neighbour in a packed row, or starts at another position."""
    model, parts = tiny(**SHAPES[name]), [draw(6, seed=1), draw(1, seed=2), draw(8, seed=3)]
    row = torch.cat([*parts, torch.zeros(3, dtype=torch.long)])[None]
    positions = torch.cat([torch.arange(n) for n in (6, 1, 8, 3)])[None]
    documents = torch.repeat_interleave(torch.tensor([0, 1, 2, -1]), torch.tensor([6, 1, 8, 3]))[None]
    packed = model(row, positions=positions, documents=documents)[0]
    assert packed.isfinite().all()
    for logits, ids in zip(packed.split([6, 1, 8, 3]), parts):
        close(logits, model(ids[None])[0])


@everywhere
@torch.no_grad()
def test_tensors_are_made_where_the_arguments_are(name):
    """A mask or an angle left on the CPU would stop the first run on a GPU, for which meta stands here."""
    meta, model = torch.device("meta"), tiny(**SHAPES[name]).to("meta")
    ids, cache = draw(2, 9).to(meta), Cache(model.config, 2, 12, meta, torch.float32)
    made = model(ids), model(ids, documents=ids), model(ids, cache=cache), model(ids[:, :1], cache=cache)
    assert all(x.device == meta for x in made)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_block_masks_equal_masks(monkeypatch, groups, softcap, window):
    """On GPUs, packed rows see something else than on CPUs; here FlexAttention's own eager code stands for its kernels."""
    monkeypatch.setattr(model, "flex", lambda name: getattr(flex_attention, name))
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 200, 8), torch.randn(2, groups, 200, 8), torch.randn(2, groups, 200, 8)
    documents = torch.repeat_interleave(torch.tensor([[0, 1, 2, -1], [0, 1, 2, 3]]), torch.tensor([90, 1, 60, 49]), dim=1)
    slots = torch.arange(200)
    wanted = attend(q, k, v, visible(slots, slots, documents, window=window), 0.5, softcap)
    close(attend(q, k, v, block_mask(documents, window), 0.5, softcap), wanted)


@everywhere
@torch.no_grad()
def test_cache_equals_no_cache(name):
    """Decoding sees other keys, positions or windows: in pieces, at a constant reach, padded, from selected rows."""
    model, ids = tiny(**SHAPES[name]), draw(2, 12)
    wanted = model(ids)
    for reach in (None, 12):
        cache = Cache(model.config, 2, 12, reach=reach)
        close(torch.cat([model(part, cache=cache) for part in ids.split([5, 4, 1, 1, 1], dim=1)], dim=1), wanted)
    padded = torch.cat([ids.new_zeros(2, 1), ids], dim=1)
    padded[1] = torch.cat([ids.new_zeros(4), ids[1, :9]])
    cache = Cache(model.config, 2, 10, padding=torch.tensor([1, 4]))
    model(padded[:, :10], cache=cache)
    cache = cache.select(torch.tensor([1, 0, 1]), 13)
    logits = torch.cat([model(padded[[1, 0, 1], i:i + 1], cache=cache) for i in range(10, 13)], dim=1)
    close(logits, torch.stack([wanted[1, 6:9], wanted[0, 9:], wanted[1, 6:9]]))


def test_full_cache_is_an_error():
    """Tokens beyond the last slot, as an error deep inside an index."""
    with pytest.raises(ValueError, match="4 slots"):
        tiny()(draw(1, 5), cache=Cache(tiny().config, 1, 4))


@everywhere
def test_logits_can_be_differentiated(name):
    """A cap, computed in place, that overwrites what its gradient needs."""
    model = tiny(**SHAPES[name])
    model(draw(2, 9)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_only_earlier_tokens_matter():
    """The future leaks into the past."""
    for options in SHAPES.values():
        model, ids = tiny(**options), draw(1, 10)
        changed = ids.clone()
        changed[0, 6:] = (ids[0, 6:] + 1) % 50
        assert torch.equal(model(ids)[:, :6], model(changed)[:, :6])


def test_codebook_rows():
    """Image rows do not follow the codebook, stand in another place, or learn nothing."""
    model = tiny(codebook_dim=5, codebook_size=20)
    assert model.model.embed_tokens.weight.shape == (30, 32) and model.model.table().shape == (50, 32)
    rows = model.model.image_rows
    close(model.model.table()[30:], rows())
    before = rows().detach()
    rows.codebook[3] += 1
    assert (rows() != before).any(1).nonzero().flatten().tolist() == [3]
    model(torch.arange(50)[None], targets=draw(1, 50)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in rows.parameters()) and not rows.codebook.requires_grad
    with pytest.raises(ValueError, match="cannot grow behind"):
        model.extend_vocab(1)


@pytest.mark.parametrize("tied", [True, False])
def test_extended_vocabulary(tied):
    """Growing changes the words, gives every code the same row, or forgets the head."""
    model, ids = tiny(tie_word_embeddings=tied), draw(1, 9)
    old, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(ids)
    model.extend_vocab(15, torch.Generator().manual_seed(0))
    for name, value in model.state_dict().items():
        assert torch.equal(value[:len(old[name])], old[name])
        if len(value) == 65:
            new, spread = value[50:], old[name].std(0)
            assert len(new.unique(dim=0)) == 15 and ((new - old[name].mean(0)).abs() < 0.1 * spread).all()
    assert model.config.vocab_size == 65 == model.model.config.vocab_size
    assert all(p.requires_grad for p in model.parameters())
    close(model(ids)[..., :50], logits)
    assert model(torch.tensor([[64]]), targets=torch.tensor([[50]])).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}, {"codebook_dim": 5, "codebook_size": 15}])
def test_train_only_rows(options):
    """`--train embeddings` moves a word, or leaves the new rows as they were."""
    model = tiny(**options)
    if "codebook_dim" not in options:
        model.extend_vocab(15)
    first = model.config.vocab_size - 15
    spare = [] if "codebook_dim" in options else [3]            # a reserved id that got a meaning
    model.train_only_rows([*range(first, first + 15), *spare])
    with pytest.raises(ValueError, match="the vocabulary"):         # which rows learn would no longer be known
        model.extend_vocab(1)
    heads = [] if model.config.tie_word_embeddings else [model.lm_head.weight]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tables = [t.detach().clone() for t in (model.model.table(), *heads)]
    ids = torch.arange(first + 15)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, targets=ids).sum().backward()
        optimizer.step()
    for old, new in zip(tables, (model.model.table(), *heads)):
        changed = (new != old).any(1).nonzero().flatten().tolist()
        assert changed == [*spare, *range(first, first + 15)]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or name.split(".")[-2] in ("embed_tokens", "lm_head", "up", "down")


@pytest.mark.parametrize("options, message", [
    ({"model_type": "mamba"}, "model_type 'mamba'"), ({"num_key_value_heads": 3}, "cannot share"), ({"hidden_size": 0}, "is 0"),
    ({"layer_types": ["full_attention"]}, "names 1 of 4"), ({"layer_types": ["none"] * 4}, "layer type 'none'"),
    ({"layer_types": ["sliding_attention"] * 4}, "sliding_window is None"), ({"head_dim": 7}, "need pairs"),
    ({"query_pre_attn_scalar": -5}, "query_pre_attn_scalar is -5"), ({"attn_logit_softcapping": "30"}, "softcapping is '30'"),
    ({"rope_scaling": {"type": "yarn"}}, "'yarn' is not supported"), ({"rope_scaling": {"type": "linear"}}, "factor of rope")])
def test_bad_configurations(options, message):
    """A network that breaks deep inside a product of matrices, or computes something else than its family does."""
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


def test_bf16_autocast_trains_with_nearly_the_gradients_of_float32():
    """The loss's own backward runs outside autocast: mixed types would raise there."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8))
    ids = torch.randint(0, 50, (2, 9))
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            nll = model(ids, targets=ids)
        nll.mean().backward()
        grads.append(model.model.embed_tokens.weight.grad.clone())
    assert nll.dtype == torch.float32 and torch.nn.functional.cosine_similarity(*grads, dim=-1).min() > 0.99


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_normalised_queries_and_keys_keep_the_type_of_values(family):
    """FlexAttention refuses float32 queries beside bf16 values, which is what autocast would make of float32 weights."""
    seen = []
    block = Transformer(ModelConfig(model_type=family, hidden_size=32, num_hidden_layers=1, head_dim=8)).model.layers[0]
    for layer in (block.self_attn.q_norm, block.self_attn.k_norm, block.self_attn.v_proj):
        layer.register_forward_hook(lambda layer, x, y: seen.append(y.dtype))
    angles = torch.ones(2, 1, 1, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(1, 5, 32), angles, None)
    assert seen == [torch.bfloat16] * 3
