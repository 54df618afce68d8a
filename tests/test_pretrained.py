"""Published weights: the logits of transformers for every family, both ways; one error for a bad folder."""

import copy
import json
import shutil
import struct
import sys

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from model import Cache, ModelConfig, Transformer  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GEMMA3 = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9000.0},
          "sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def heads(groups, head_dim=8):
    return {"num_key_value_heads": groups, "head_dim": head_dim}


SHAPES = {
    "llama-mha": ("llama", {}),
    "llama-gqa-scaled": ("llama", heads(2) | {"rope_parameters": LLAMA3}),
    "llama-mqa-biased": ("llama", heads(1, 6) | {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", heads(2) | TIED | {"rms_norm_eps": 1e-3}),
    "qwen2-gqa": ("qwen2", {"num_key_value_heads": 2,
                            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-windows-tied": ("qwen2", {"num_key_value_heads": 4} | TIED | WINDOWS),
    "qwen3-gqa": ("qwen3", heads(2, 12) | TIED),
    "qwen3-biased-windows": ("qwen3", heads(1) | {"attention_bias": True} | WINDOWS),
    "gemma-mqa": ("gemma", heads(1, 12)),
    "gemma-mha-biased": ("gemma", heads(4) | UNTIED | {"attention_bias": True}),
    "gemma2-gqa": ("gemma2", heads(2, 12) | {"sliding_window": 4, "query_pre_attn_scalar": 5}),
    "gemma2-caps": ("gemma2", heads(4) | {"sliding_window": 3, "attn_logit_softcapping": 0.7,
                                          "final_logit_softcapping": 2.0}),
    "gemma3-gqa-scaled": ("gemma3_text", heads(2, 12) | {"sliding_window": 4, "query_pre_attn_scalar": 30,
                                                         "rope_parameters": GEMMA3}),
    "gemma3-mqa-capped": ("gemma3_text", heads(1) | UNTIED | {
        "sliding_window": 3, "final_logit_softcapping": 2.0,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
}
OLD = {     # as the files of published models still spell them
    "llama": ("llama", {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0},
                        "torch_dtype": "float32"}),
    "llama3": ("llama", {"rope_theta": 5000.0,
                         "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
    "qwen2": ("qwen2", {"rope_theta": 300.0, "rope_scaling": None, "num_key_value_heads": 2, **WINDOWS}),
    "qwen2-off": ("qwen2", {"rope_theta": 300.0, "num_key_value_heads": 2, **WINDOWS,
                            "use_sliding_window": False}),
    "gemma": ("gemma", heads(1) | {"hidden_act": "gelu", "hidden_activation": None, "rope_theta": 300.0}),
    "gemma2": ("gemma2", heads(2) | {
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 300.0,
        "sliding_window": 3, "query_pre_attn_scalar": 24}),
    "gemma3": ("gemma3_text", heads(2) | {
        "rope_theta": 9000.0, "rope_local_base_freq": 70.0, "sliding_window_pattern": 2, "sliding_window": 3,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
}
sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 128}


def reference(kind, options, folder):
    """A random model of transformers, saved; norms and biases, too, are far from where they start."""
    torch.manual_seed(0)
    options = copy.deepcopy(options)        # the library writes into dicts
    config = transformers.AutoConfig.for_model(kind, **sizes, attn_implementation="eager", **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def in_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def draw(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def decode(model, ids, prompt, padding=None):
    """Logits of ids, read as a prompt and then one by one."""
    cache = Cache(model.config, len(ids), ids.shape[1], padding=padding)
    parts = ids.split([prompt] + [1] * (ids.shape[1] - prompt), dim=1)
    return torch.cat([model(part, cache=cache) for part in parts], dim=1)


@pytest.mark.rotary
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, tmp_path):
    """A norm, bias, window, cap, scale or rotary base is forgotten: uncached, cached, padded or exported."""
    theirs = reference(*SHAPES[name], tmp_path)
    ours, ids = Transformer.from_pretrained(tmp_path), draw(2, 14)
    wanted = theirs(ids).logits
    close(ours(ids), wanted)
    close(decode(ours, ids, 9), wanted)

    padded = torch.stack([ids[0], F.pad(ids[1, :9], (5, 0))])
    batch = decode(ours, padded, 9, padding=torch.tensor([0, 5]))
    close(batch[0], wanted[0])
    close(batch[1, 5:], wanted[1, :9])

    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(in_transformers(tmp_path / "again")(ids).logits, wanted)
    assert torch.equal(Transformer.from_pretrained(tmp_path / "again")(ids), ours(ids))


@pytest.mark.parametrize("name", ["llama-gqa-scaled", "qwen2-windows-tied", "gemma2-caps"])
@torch.no_grad()
def test_image_rows_come_back(name, tmp_path):
    """An export loses rows of the table or of an untied head, or reading it takes image rows for words."""
    reference(*SHAPES[name], tmp_path)
    model, ids = Transformer.from_pretrained(tmp_path), torch.arange(43, 57)[None]
    model.extend_vocab(7, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    close(in_transformers(tmp_path)(ids).logits, model(ids))
    again = Transformer.from_pretrained(tmp_path, image_rows=7)
    assert again.config.vocab_size == 50 and torch.equal(again(ids), model(ids))
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("name", OLD)
@torch.no_grad()
def test_older_spelling(name, tmp_path):
    """Keys that newer releases renamed are overlooked, or an export does not spell them as its source."""
    kind, options = OLD[name]
    theirs, source = reference(kind, options, tmp_path), {"model_type": kind, **sizes, **options, "own": [1]}
    (tmp_path / "config.json").write_text(json.dumps(source))
    ours = Transformer.from_pretrained(tmp_path)
    close(ours(draw(1, 14)), theirs(draw(1, 14)).logits)
    ours.extend_vocab(7)
    ours.save_pretrained(tmp_path, eos_token_id=3)
    assert json.loads((tmp_path / "config.json").read_text()) == source | {
        "architectures": [type(theirs).__name__], "vocab_size": 57, "dtype": "float32", "eos_token_id": 3}


@torch.no_grad()
def test_from_scratch_model_opens_in_transformers(tmp_path):
    """Rows made from a codebook are lost on export, or the order of the table changes."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=30, image_rows=22, codebook=(20, 5), hidden_size=32,
                                    intermediate_size=64, num_hidden_layers=2, head_dim=12))
    model.model.embed_tokens.image_rows.start(torch.randn(20, 5))
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    ids = torch.arange(52)[None]
    close(in_transformers(tmp_path)(ids).logits, model(ids))
    close(Transformer.from_pretrained(tmp_path, image_rows=22)(ids), model(ids))


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text", "qwen2", "llama"])
@torch.no_grad()
def test_every_family_is_exported_from_scratch(kind, tmp_path):
    """A window, a cap or a scale that transformers adds by default to what config.json leaves out."""
    act = "gelu_pytorch_tanh" if "gemma" in kind else "silu"
    model = Transformer(ModelConfig(model_type=kind, hidden_act=act))
    model.save_pretrained(tmp_path)
    close(in_transformers(tmp_path)(draw(1, 9)).logits, model(draw(1, 9)))


@pytest.mark.parametrize("options", [
    {"mlp_bias": True}, {"final_logit_softcapping": 3.0}, {"query_pre_attn_scalar": 7},
    {"layer_types": ["sliding_attention"] * 4, "sliding_window": 3}])
def test_export_refuses_what_the_family_cannot_say(options, tmp_path):
    """transformers overlooks what its class does not know, and the exported model computes something else."""
    with pytest.raises(ValueError, match="of transformers cannot have"):
        Transformer(ModelConfig(**options)).save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["gemma2", "qwen3"])
@torch.no_grad()
def test_bfloat16(kind, tmp_path):
    """Weights change their type on the way in or out; a norm or Gemma's scale rounds in another place."""
    theirs, first, ids = reference(kind, heads(2), tmp_path).bfloat16(), [], draw(1, 14)
    theirs.save_pretrained(tmp_path)
    assert Transformer.from_pretrained(tmp_path).dtype == torch.float32
    ours = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16, image_rows=8)
    ours.model.layers[0].register_forward_pre_hook(lambda block, inputs: first.append(inputs[0]))
    wanted, logits = theirs(ids, output_hidden_states=True), ours(ids)
    x = wanted.hidden_states[0]
    assert torch.equal(first[0], x) and torch.equal(ours.model.norm(x), theirs.model.norm(x))
    assert (logits - wanted.logits).abs().max() < 0.05 * wanted.logits.abs().max()
    ours.save_pretrained(tmp_path)
    saved = safetensors_torch.load_file(tmp_path / "model.safetensors").values()
    assert {tensor.dtype for tensor in (*saved, *ours.parameters())} == {torch.bfloat16}


@torch.no_grad()
def test_shards(tmp_path):
    """Weights in several files are read or written in part; a shorter save leaves a longer one's files."""
    theirs, folder = reference("qwen2", {"num_key_value_heads": 2}, tmp_path), tmp_path / "ours"
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    model, wanted = Transformer.from_pretrained(tmp_path / "many"), theirs(draw(1, 9)).logits
    close(model(draw(1, 9)), wanted)
    model.save_pretrained(folder, shard=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    close(in_transformers(folder)(draw(1, 9)).logits, wanted)
    model.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_leftovers_that_mean_nothing(tmp_path):
    """A tied head's copy or old rotary constants make a good folder unreadable; a head of its own is lost."""
    reference("qwen3", heads(2) | TIED, tmp_path)
    before, path = Transformer.from_pretrained(tmp_path).state_dict(), tmp_path / "model.safetensors"
    weights = safetensors_torch.load_file(path)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    safetensors_torch.save_file(weights, path)
    after = Transformer.from_pretrained(tmp_path).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    weights["lm_head.weight"][3, 3] += 1
    safetensors_torch.save_file(weights, path)
    refused(tmp_path, "lm_head.weight")


# -----------------------------------------------------------------------------------------------------------
# Errors: one ValueError each, which names the file or the tensor

@pytest.fixture
def folder(tmp_path):
    reference("qwen3", heads(2), tmp_path / "model")
    return tmp_path / "model"


def refused(folder, message):
    """In one line, which names the folder."""
    with pytest.raises(ValueError, match=message) as caught:
        Transformer.from_pretrained(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key, value", [
    ("model_type", "mixtral"), ("model_type", ["llama"]), ("hidden_act", "gelu"), ("head_dim", 3),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}), ("rope_scaling", {"rope_type": "linear"}),
    ("rope_scaling", {"partial_rotary_factor": 0.5}), ("rope_scaling", "linear"), ("num_key_value_heads", 3),
    ("hidden_size", "32"), ("use_bidirectional_attention", True),
    ("quantization_config", {"bits": 4}), ("layer_types", ["chunked_attention"] * 3)])
def test_bad_config(folder, key, value):
    """A model that we do not have loads anyway and computes nonsense."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if key == "rope_scaling":
        del config["rope_parameters"]
    path.write_text(json.dumps(config | {key: value}))
    refused(folder, "config.json: ")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "{}", None])
def test_bad_json(folder, text):
    """A download that broke off, or was never made, ends in a traceback."""
    (folder / "config.json").unlink() if text is None else (folder / "config.json").write_text(text)
    refused(folder, "config.json: ")


def lie(raw, **entry):
    """Change the header's entry of one tensor."""
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    header["model.norm.weight"] |= entry
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + raw[8 + size:]


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:-1], lambda raw: struct.pack("<Q", 2 ** 62) + raw[8:],
    lambda raw: lie(raw, shape=[10 ** 12]), lambda raw: lie(raw, dtype="F99")])
def test_bad_weights(folder, damage):
    """Half a download, or a header that lies, is more than one sentence of error."""
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, "weights cannot be read")


@pytest.mark.parametrize("name, tensor, message", [
    ("model.norm.weight", None, "is missing"), ("model.norm.bias", torch.ones(32), "has no place"),
    ("lm_head.weight", None, "is missing"), ("model.norm.weight", torch.ones(31), "size mismatch")])
def test_tensors_must_fit(folder, name, tensor, message):
    """A tensor that is missing, unknown or of another shape passes in silence."""
    path = folder / "model.safetensors"
    weights = safetensors_torch.load_file(path) | {name: tensor}
    safetensors_torch.save_file({k: v for k, v in weights.items() if v is not None}, path)
    refused(folder, rf"{name}.*{message}|{message}.*{name}")


@pytest.mark.parametrize("shard", ["../a.safetensors", "/a.safetensors", "b.safetensors", 1, None])
def test_bad_index(folder, shard):
    """An index leads out of its folder, or to a file that is not there."""
    shutil.move(folder / "model.safetensors", folder.parent / "a.safetensors")
    refused(folder, "weights cannot be read")
    index = {} if shard is None else {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "weights cannot be read")


def test_pickles_are_refused(folder):
    """Weights of strangers run code: a folder has a pickle alone, by its name or that of safetensors."""
    state = safetensors_torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    refused(folder, "weights cannot be read")
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    refused(folder, "weights cannot be read")


@pytest.mark.parametrize("library", ["transformers", "huggingface_hub"])
def test_the_extra_is_named(folder, monkeypatch, library):
    """Without the libraries the user sees an ImportError in place of the command to install them."""
    monkeypatch.setitem(sys.modules, library, None)
    for use in (Transformer.from_pretrained, Transformer(ModelConfig()).save_pretrained):
        with pytest.raises(ValueError, match=rf'need {library}: pip install -e "\.\[pretrained\]"'):
            use(folder)
