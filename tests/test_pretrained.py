"""Published weights: the logits of transformers for every family, in both directions, and one clear error for each bad folder."""

import json
import struct
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from model import FAMILIES, SIZES, Cache, ModelConfig, Transformer, config_from_hf, config_to_hf  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
GEMMA3 = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9000.0},
          "sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}

SHAPES = {
    "llama-mha": ("llama", {}),
    "llama-gqa-scaled": ("llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama-mqa-biased": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "llama-tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "qwen2-gqa": ("qwen2", {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-windows-tied": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True, **WINDOWS}),
    "qwen3-gqa": ("qwen3", {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-biased-windows": ("qwen3", {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": True, **WINDOWS}),
    "gemma-mqa": ("gemma", {"num_key_value_heads": 1, "head_dim": 12}),
    "gemma-mha-biased": ("gemma", {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": True,
                                   "tie_word_embeddings": False}),
    "gemma2-gqa": ("gemma2", {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 5}),
    "gemma2-caps": ("gemma2", {"num_key_value_heads": 4, "head_dim": 8, "sliding_window": 3, "attn_logit_softcapping": 0.7,
                               "final_logit_softcapping": 2.0}),
    "gemma3-gqa-scaled": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 4,
                                          "query_pre_attn_scalar": 30, "rope_parameters": GEMMA3}),
    "gemma3-mqa-capped": ("gemma3_text", {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 3,
                                          "final_logit_softcapping": 2.0, "tie_word_embeddings": False,
                                          "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
}
sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 128}


def reference(kind, options, folder):
    """A random model of transformers, saved; every parameter, norms and biases too, is far from what it starts as."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes, attn_implementation="eager", **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def draw(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def decode(model, ids, prompt, padding=None):
    """Logits of ids, read as a prompt and then one by one."""
    cache = Cache(model.config, len(ids), ids.shape[1], padding=padding)
    parts = [model(ids[:, :prompt], cache=cache)]
    return torch.cat(parts + [model(ids[:, i:i + 1], cache=cache) for i in range(prompt, ids.shape[1])], dim=1)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, tmp_path):
    """A norm, bias, window, cap, scale or rotary base is forgotten: uncached, cached, in a padded batch or on the way back."""
    theirs = reference(*SHAPES[name], tmp_path)
    ours, ids = Transformer.from_pretrained(tmp_path), draw(2, 14)
    wanted = theirs(ids).logits
    close(ours(ids), wanted)
    close(decode(ours, ids, 9), wanted)

    padded = ids.clone()
    padded[1] = torch.cat([torch.zeros(5, dtype=torch.long), ids[1, :9]])       # a row of nine behind five slots of padding
    batch = decode(ours, padded, 9, padding=torch.tensor([0, 5]))
    close(batch[0], wanted[0])
    close(batch[1, 5:], wanted[1, :9])

    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    assert torch.equal(again(ids).logits, wanted)
    assert torch.equal(Transformer.from_pretrained(tmp_path / "again")(ids), ours(ids))


OLD = {
    "llama": ("llama", {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}),
    "llama3": ("llama", {"rope_theta": 5000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
    "qwen2": ("qwen2", {"rope_theta": 300.0, "rope_scaling": None, "num_key_value_heads": 2, **WINDOWS}),
    "qwen2-off": ("qwen2", {"rope_theta": 300.0, "num_key_value_heads": 2, **WINDOWS, "use_sliding_window": False}),
    "gemma": ("gemma", {"hidden_act": "gelu", "hidden_activation": None, "rope_theta": 300.0, "num_key_value_heads": 1,
                        "head_dim": 8}),
    "gemma2": ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 300.0,
                          "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 3, "query_pre_attn_scalar": 24}),
    "gemma3": ("gemma3_text", {"rope_theta": 9000.0, "rope_local_base_freq": 70.0, "sliding_window_pattern": 2,
                               "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 3, "head_dim": 8,
                               "num_key_value_heads": 2}),
}


@pytest.mark.parametrize("name", OLD)
@torch.no_grad()
def test_older_spelling(name, tmp_path):
    """Keys that newer releases renamed, as the files of published models still have them, are overlooked."""
    kind, options = OLD[name]
    theirs = reference(kind, options, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes, **options}))
    close(Transformer.from_pretrained(tmp_path)(draw(1, 14)), theirs(draw(1, 14)).logits)


@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_are_those_of_transformers(kind):
    """A key that config.json leaves out means something else here than there."""
    given = sizes | {"hidden_size": 128, "num_attention_heads": 32}     # Qwen's default is 32 key-value heads
    theirs = transformers.AutoConfig.for_model(kind, **given).to_dict()
    assert config_from_hf({"model_type": kind, **given}) == config_from_hf(theirs)


@torch.no_grad()
def test_from_scratch_model_opens_in_transformers(tmp_path):
    """Rows made from a codebook are lost on export, or the order of the table changes."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, codebook_dim=5,
                                    codebook_size=20))
    model.model.image_rows.start(torch.randn(20, 5))
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    ids = draw(2, 10)
    close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids))
    close(Transformer.from_pretrained(tmp_path)(ids), model(ids))


@torch.no_grad()
def test_extended_model_opens_in_transformers(tmp_path):
    """An untied head that does not grow with the table, or a vocab_size that is not written."""
    reference("llama", {}, tmp_path)
    model = Transformer.from_pretrained(tmp_path)
    model.extend_vocab(7, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    ids = torch.arange(45, 57)[None]
    close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids))


@torch.no_grad()
def test_bfloat16(tmp_path):
    """Weights stored in bf16 come in another type than asked for, or Gemma's scale is not rounded as it was in training."""
    theirs = reference("gemma2", {"num_key_value_heads": 2, "head_dim": 8}, tmp_path).bfloat16()
    theirs.save_pretrained(tmp_path)
    assert Transformer.from_pretrained(tmp_path).dtype == torch.float32
    ours = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    wanted = theirs(draw(1, 14)).logits.float()
    assert (ours(draw(1, 14)) - wanted).abs().max() < 0.05 * wanted.abs().max()


@torch.no_grad()
def test_shards(tmp_path):
    """Weights in several files, theirs or ours, are read in part; a shorter save leaves the longer one's files behind."""
    theirs = reference("qwen2", {"num_key_value_heads": 2}, tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    model, wanted = Transformer.from_pretrained(tmp_path / "many"), theirs(draw(1, 9)).logits
    close(model(draw(1, 9)), wanted)
    model.save_pretrained(tmp_path / "ours", shard=20_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(draw(1, 9)).logits, wanted)
    model.save_pretrained(tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]


def test_leftovers_that_mean_nothing(tmp_path):
    """The copy of a tied head, or rotary constants of old releases, make a good folder unreadable."""
    reference("qwen3", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}, tmp_path)
    weights = safetensors_torch.load_file(tmp_path / "model.safetensors")
    weights |= {"lm_head.weight": torch.ones(50, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    before = Transformer.from_pretrained(tmp_path).state_dict()
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors")
    after = Transformer.from_pretrained(tmp_path).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


# ---------------------------------------------------------------------------------------------------------------------
# Errors: one ValueError each, which names the file or the tensor

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    reference("llama", {"num_key_value_heads": 2}, folder)
    return folder


def copied(good, folder, **config):
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((good / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(json.loads((good / "config.json").read_text()) | config))
    return folder


@pytest.mark.parametrize("key, value", [
    ("model_type", "mixtral"), ("model_type", None), ("model_type", ["llama"]), ("hidden_act", "gelu"), ("hidden_act", None),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}), ("rope_scaling", {"rope_type": "linear"}), ("rope_scaling", "linear"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}), ("rope_scaling", {"partial_rotary_factor": 0.5}), ("head_dim", 7),
    ("hidden_size", "32"), ("hidden_size", None), ("num_hidden_layers", -1), ("num_attention_heads", 0),
    ("num_key_value_heads", 3), ("rms_norm_eps", None), ("vocab_size", True), ("use_bidirectional_attention", True)])
def test_bad_config(good, tmp_path, key, value):
    """A model we do not have loads anyway and computes nonsense."""
    with pytest.raises(ValueError, match="config.json: "):
        Transformer.from_pretrained(copied(good, tmp_path, **{key: value}))


def test_missing_config_keys():
    """A size that the folder does not give is guessed, or a layer that we do not have runs as another one."""
    for name in SIZES:
        with pytest.raises(ValueError, match=f"{name} is missing"):
            config_from_hf({"model_type": "llama", **{k: v for k, v in sizes.items() if k != name}})
    with pytest.raises(ValueError, match="model_type"):
        config_from_hf(["llama"])
    with pytest.raises(ValueError, match="'chunked_attention' is not supported"):
        config_from_hf({"model_type": "gemma2", **sizes, "layer_types": ["chunked_attention"] * 3})


def test_bad_json(good, tmp_path):
    """A download that broke off, or was never made, ends in a traceback."""
    copied(good, tmp_path)
    for text in ("", "{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json: cannot be read as JSON"):
            Transformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: cannot be read"):
        Transformer.from_pretrained(tmp_path)


def lie(raw, **entry):
    """Change the header's entry of one tensor."""
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    header["model.norm.weight"] |= entry
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + raw[8 + size:]


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:-1], lambda raw: raw[:100], lambda raw: b"PK\3\4" + raw,
    lambda raw: struct.pack("<Q", 2 ** 62) + raw[8:],
    lambda raw: lie(raw, shape=[10 ** 12]), lambda raw: lie(raw, dtype="F99"), lambda raw: lie(raw, data_offsets=[0, 10 ** 15])])
def test_bad_weights(good, tmp_path, damage):
    """Half a download, or a header that lies, is more than one sentence of error."""
    path = copied(good, tmp_path) / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="model.safetensors: cannot be read as safetensors"):
        Transformer.from_pretrained(tmp_path)


def test_tensors_must_fit(good, tmp_path):
    """A tensor that is missing, unknown or of another shape passes in silence."""
    path = copied(good, tmp_path) / "model.safetensors"
    weights = safetensors_torch.load_file(path)
    for change, message in (({"model.norm.weight": None}, "tensor model.norm.weight is missing"),
                            ({"lm_head.weight": None}, "tensor lm_head.weight is missing"),
                            ({"model.norm.bias": torch.ones(32)}, "model.safetensors: tensor model.norm.bias has no place"),
                            ({"model.norm.weight": torch.ones(31)}, r"tensor model.norm.weight is \(31,\)")):
        safetensors_torch.save_file({k: v for k, v in (weights | change).items() if v is not None}, path)
        with pytest.raises(ValueError, match=message):
            Transformer.from_pretrained(tmp_path)


def test_bad_index(good, tmp_path):
    """An index leads out of its folder, or to a file that is not there."""
    copied(good, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: cannot be read"):
        Transformer.from_pretrained(tmp_path)
    for content, message in (({}, "has no weight_map"), ([], "has no weight_map"),
                             ({"weight_map": {"x": 1}}, "has no weight_map"),
                             ({"weight_map": {"x": "../a.safetensors"}}, "has no weight_map"),
                             ({"weight_map": {"x": "b.safetensors"}}, "b.safetensors: cannot be read")):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            Transformer.from_pretrained(tmp_path)


def test_the_extra_is_named(good, monkeypatch):
    """Without safetensors the user sees an ImportError in place of the command to install it."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for use in (lambda: Transformer.from_pretrained(good), lambda: Transformer(ModelConfig()).save_pretrained(good)):
        with pytest.raises(ValueError, match=r'pip install -e "\.\[pretrained\]"'):
            use()


@pytest.mark.parametrize("name, value", [("mlp_bias", True), ("final_logit_softcapping", 3.0), ("query_pre_attn_scalar", 7)])
def test_export_refuses_what_the_family_cannot_say(name, value):
    """transformers drops what its class does not know, and the exported model computes something else."""
    with pytest.raises(ValueError, match=f"a qwen3 of transformers cannot have {name} {value}"):
        config_to_hf(ModelConfig(**{name: value}))
