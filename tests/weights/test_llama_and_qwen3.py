"""What must hold beside Hugging Face's Llama and Qwen3: the same numbers from the same weights, and the weights back.

The golden was computed by transformers on a CPU (``goldens/make_families.py`` says how and with which versions), so
that neither it nor PyTorch is needed here. If a limit breaks, ours moved: theirs is a file.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from refusals import refused
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from slm_jax.model import GPTConfig, GPTModel, init_cache, param_shapes
from slm_jax.runs import load_pretrained
from slm_jax.training.config import OptimizerConfig
from slm_jax.training.optimizer import make_optimizer
from slm_jax.weights.registry import find_format
from slm_jax.weights.writer import save_pretrained

NAMES = (
    *("llama", "llama-grouped", "llama-one-kv-head", "llama3", "llama-wide-heads", "llama-biases"),
    *("llama-attention-bias", "llama-mlp-bias", "qwen3", "qwen3-untied", "qwen3-bias"),
)
PIECES = 3  # in which the cached model is fed


@functools.cache
def read_goldens():
    with safe_open(Path(__file__).parent.parent / "goldens" / "families.safetensors", "numpy") as file:
        figures = json.loads(file.metadata()["golden"])
        return figures, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def write_golden(name, folder, **changes):
    """Write one of the models as ``save_pretrained`` of transformers did, with keys of its configuration changed."""
    figures, tensors = read_goldens()
    prefix = f"{name}/state/"
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**figures["configs"][name], **changes}))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


class Golden:
    """One of the models with its weights in ours, and what transformers computed from them."""

    def __init__(self, name, folder):
        figures, tensors = read_goldens()
        self.theirs = {
            key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")
        }
        self.folder = write_golden(name, folder)
        self.cfg, self.params = load_pretrained(self.folder)
        self.form = find_format("huggingface", self.cfg)
        self.betas = figures["betas"]

    def tree(self, kind):
        prefix = f"{kind}/"
        found = {key.removeprefix(prefix): value for key, value in self.theirs.items() if key.startswith(prefix)}
        return {self.form.clean(name): value for name, value in found.items()}

    def in_their_names(self, params):
        leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
        return {name: slot.read(leaves) for name, slot in self.form.names(self.cfg).items()}

    @functools.cached_property
    def ours(self):
        """Logits, cached logits, gradients, and AdamW's state after a step."""
        model, tokens = GPTModel(self.cfg), jnp.asarray(self.theirs["batch"])
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        optimizer = make_optimizer(OptimizerConfig(beta1=self.betas[0], beta2=self.betas[1], clip_norm=1e9))

        def loss(params):
            logits = model.apply({"params": params}, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), logits

        @jax.jit
        def train(params):
            gradients, logits = jax.grad(loss, has_aux=True)(params)
            return logits, gradients, optimizer.update(gradients, optimizer.init(params), params)[1]

        feed = jax.jit(lambda params, part, cache: model.apply({"params": params}, part, cache=cache))
        with jax.default_matmul_precision("highest"):
            cache, cached = init_cache(self.cfg, self.params, len(inputs), inputs.shape[1]), []
            for part in jnp.split(inputs, PIECES, axis=1):
                logits, cache = feed(self.params, part, cache)
                cached.append(logits)
            logits, gradients, state = train(self.params)
        return logits, jnp.concatenate(cached, axis=1), gradients, state


@functools.cache
def _golden(name, root):
    return Golden(name, root / name)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module", params=NAMES)
def golden(request, root):
    return _golden(request.param, root)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def norm(tensors):
    return float(np.sqrt(sum(np.square(t, dtype=np.float64).sum() for t in tensors)))


def test_log_probabilities_with_and_without_a_cache(golden):
    logits, cached = map(log_softmax, golden.ours[:2])
    assert np.abs(logits - log_softmax(golden.theirs["logits"])).max() <= 1e-4
    assert np.abs(cached - logits).max() <= 1e-5


def test_gradients_and_adamw_moments(golden):
    gradients, state = golden.ours[2:]
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    for kind, tree in (("gradients", gradients), ("exp_avg", adam.mu), ("exp_avg_sq", adam.nu)):
        ours, theirs = golden.in_their_names(tree), golden.tree(kind)
        assert ours.keys() >= theirs.keys()
        error = norm(ours[name] - theirs[name] for name in theirs) / norm(theirs.values())
        assert error <= 1e-5, f"{kind}: {error:.1e} of their norm"


def test_the_weights_come_back_bit_for_bit_and_only_zeros_are_added(golden, tmp_path):
    folder = save_pretrained(golden.cfg, golden.params, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (golden.folder, folder))
    assert before.keys() <= after.keys()
    for name, tensor in after.items():
        expected = before.get(name, np.zeros_like(tensor))
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    cfg, params = load_pretrained(folder)
    assert cfg == golden.cfg
    jax.tree.map(np.testing.assert_array_equal, params, golden.params)


def test_the_shapes_are_those_that_must_be_covered():
    configs = read_goldens()[0]["configs"].values()
    groups = {config["num_attention_heads"] // config["num_key_value_heads"] for config in configs}
    assert groups >= {1, 2, 3, 4}
    assert {config["rope_parameters"]["rope_type"] for config in configs} == {"default", "linear", "llama3"}
    assert any(c["head_dim"] * c["num_attention_heads"] != c["hidden_size"] for c in configs)
    assert {config["tie_word_embeddings"] for config in configs} == {True, False}
    assert {config["model_type"] for config in configs} == {"llama", "qwen3"}


@pytest.mark.parametrize("name", ["llama", "llama-grouped", "llama3"])
def test_transformers_4_states_rotary_positions_in_other_keys(name, root, tmp_path):
    rope = dict(read_goldens()[0]["configs"][name]["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for word in ("type", "rope_type"):
        scaling = None if kind == "default" else {word: kind, **rope}
        folder = write_golden(name, tmp_path / word, rope_parameters=None, rope_scaling=scaling, rope_theta=theta)
        assert load_pretrained(folder)[0] == _golden(name, root).cfg


def test_buffers_a_tied_head_and_missing_keys_of_older_files(root, tmp_path):
    folder = write_golden("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    cfg, params = load_pretrained(folder)
    expected = _golden("llama", root)
    assert cfg == dataclasses.replace(expected.cfg, n_kv_heads=None, head_dim=None)
    jax.tree.map(np.testing.assert_array_equal, params, expected.params)


ROPE = {"rope_theta": 100.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"sliding_window": 4096}, "sliding_window is 4096; expected null"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"layer_types": 5}, "layer_types"),
        ({"num_local_experts": 8}, "num_local_experts is 8: a mixture of experts"),
        ({"moe_intermediate_size": 8}, "mixture of experts"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}}, '"yarn"'),
        ({"rope_parameters": None, "rope_scaling": {"type": ["dynamic"], "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": {**ROPE, "rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": {"full_attention": ROPE}}, "rope_parameters"),
        ({"rope_parameters": "none"}, 'rope_parameters is "none"'),
        ({"rope_parameters": {"rope_theta": "big"}}, 'rope_theta is "big"'),
        ({"num_attention_heads": 10**9}, "expected"),
        ({"num_attention_heads": 0}, "expected"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"attention_sinks": 4}, "attention sinks"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"num_key_value_heads": 3}, "n_kv_heads is 3; expected a divisor of model.n_heads 4"),
        ({"num_key_value_heads": 2}, "k_proj.weight has the shape"),
        ({"num_attention_heads": "4"}, 'num_attention_heads is "4"'),
        ({"num_attention_heads": None}, "num_attention_heads is null"),
        ({"num_hidden_layers": 10**12}, "n_layers is 1000000000000"),
        ({"intermediate_size": 10**12}, "hidden_dim is 1000000000000"),
        ({"head_dim": 10**9}, "has the shape"),
        ({"rms_norm_eps": "tiny"}, 'rms_norm_eps is "tiny"'),
        ({"attention_bias": True}, "bias is True as stated"),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight"),
        ({"model_type": "mistral"}, "'mistral'"),
        ({"model_type": "qwen3"}, "missing: layers.0.self_attn.q_norm.weight"),
        ({"model_type": "gpt2"}, "model.layers.0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_computed_or_does_not_fit_is_refused_by_name(changes, expected, tmp_path):
    with refused(expected):
        load_pretrained(write_golden("llama", tmp_path, **changes))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    folder = write_golden("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.sinks"
    save_file(tensors | {name: np.ones(4, np.float32)}, folder / "model.safetensors")
    with refused(f"unknown to Llama: {name}"):
        load_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").unlink()
    with refused("config.json: no such file"):
        load_pretrained(folder)


def ones(cfg):
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), param_shapes(cfg))


LLAMA = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "bias": False}
SMALL = {"vocab_size": 11, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 1}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"positions": "rope"}, "GPT-2 needs positions learned; Llama needs norm rmsnorm, mlp swiglu"),
        ({"qk_norm": True}, "GPT-2 needs qk_norm false"),
        ({"n_kv_heads": 1}, "GPT-2 needs n_kv_heads null"),
        ({"head_dim": 6}, "GPT-2 needs head_dim null"),
        ({**LLAMA, "qk_norm": True, "bias": True}, "Qwen3 has no place for parameter blocks/ff/"),
    ],
    ids=["rope", "qk_norm", "kv_heads", "head_dim", "qwen3-bias"],
)
def test_a_model_of_no_family_is_refused_and_nothing_is_left(fields, expected, tmp_path):
    cfg = GPTConfig(**{**SMALL, **fields})
    params = ones(cfg)
    with refused(expected):
        save_pretrained(cfg, params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_gpt2_with_another_norm_eps_and_width_comes_back(tmp_path):
    cfg = GPTConfig(**SMALL, norm_eps=1e-3, hidden_dim=12)
    params = ones(cfg)
    again, loaded = load_pretrained(save_pretrained(cfg, params, tmp_path / "hf"))
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for format in ("nanogpt", "book"):
        with refused("needs hidden_dim null, norm_eps 1e-05"):
            save_pretrained(cfg, params, tmp_path / format, format=format)


def test_a_classifier_with_rmsnorm_is_written_if_it_has_no_bias(tmp_path):
    cfg = GPTConfig(**SMALL, **LLAMA)
    params = ones(cfg) | {"class_head": {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)}}
    with refused("Llama's classifiers have no bias"):
        save_pretrained(cfg, params, tmp_path / "out", classes=("a", "b"))
    params["class_head"]["bias"] *= 0
    folder = save_pretrained(cfg, params, tmp_path / "out", classes=("a", "b"))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    assert load_file(folder / "model.safetensors")["score.weight"].shape == (2, 8)
