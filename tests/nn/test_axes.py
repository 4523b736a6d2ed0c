"""What must hold of the table of axes: it describes every parameter, and only the model's own modules name one."""

import ast
import dataclasses
import re
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

import slm_jax
from slm_jax.model import GPTClassifier, GPTConfig, axis_sizes, count_params, init_classifier, param_shapes
from slm_jax.nn.axes import TABLE, count, find_axes
from slm_jax.nn.blocks import merge_params, split_blocks
from slm_jax.nn.lora import init_adapters
from slm_jax.training.optimizer import decay_mask

CFG = GPTConfig(vocab_size=29, context_length=16, emb_dim=12, n_heads=3, n_layers=2, tie_weights=False)


def shapes(tree):
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def test_the_table_and_the_sizes_give_the_shape_of_every_parameter():
    cfg = dataclasses.replace(CFG, mlp="swiglu", hidden_dim=20, n_kv_heads=1, head_dim=6, qk_norm=True)  # has them all
    classifier = jax.eval_shape(lambda: init_classifier(GPTClassifier(cfg, n_classes=5), jax.random.key(0)))
    actual = shapes(classifier) | shapes(param_shapes(cfg))
    sizes = axis_sizes(cfg) | {"classes": 5}
    assert actual == {path: axes.shape(sizes) for path, axes in TABLE.items()}
    assert count(param_shapes(cfg)) == count_params(cfg)


def test_segments_adapters_and_optimizer_state_have_axes_too():
    params = param_shapes(CFG)
    adapters = jax.eval_shape(lambda: init_adapters(jax.random.key(0), params, ("*",), rank=2, alpha=2.0))
    sizes = axis_sizes(CFG) | {"rank": 2, "heads*head_dim": 12, "kv_heads*head_dim": 12}
    for path, shape in shapes(adapters).items():
        axes = find_axes(path)
        assert axes.shape(sizes) == shape
        assert axes.is_matrix == axes.is_adapter == (not path.endswith("lora_scale"))
    segments = jax.eval_shape(lambda tree: split_blocks(tree, 1), merge_params(params, adapters))
    for path in shapes(segments):
        assert find_axes(path) == find_axes(re.sub(r"blocks_\d", "blocks", path)) == find_axes(f"mu/{path}")
    assert find_axes("count") is None
    assert find_axes("blocks/attn/count") is None


def test_a_width_that_only_shards_by_head_is_found():
    """Each of the projections has an axis of heads, which tensor parallelism can split without moving data."""
    for name in "qkv":
        assert find_axes(f"blocks/attn/{name}/kernel").outputs == ("heads" if name == "q" else "kv_heads", "head_dim")
    assert find_axes("blocks/attn/out_proj/kernel").inputs == ("heads", "head_dim")
    decays = {path for path, decays in flatten_dict(decay_mask(param_shapes(CFG)), sep="/").items() if decays}
    assert decays == {path for path in shapes(param_shapes(CFG)) if path.endswith(("kernel", "embedding"))}


# What only the model's own modules know

PACKAGE = Path(slm_jax.__file__).parent
# Beside the model: the name maps, and the patterns by which other families are recognised.
FORMATS = (path.name for path in PACKAGE.glob("weights/*.py") if "\nFORMAT" in path.read_text())
MAPS = tuple(f"weights/{name}" for name in (*FORMATS, "names.py", "registry.py"))
KNOW = ("model.py", "attention.py", "nn/", *MAPS)
PARTS = sorted({part for path in TABLE for part in path.split("/")[:-1]} - {"blocks", "attn", "ff", "q", "k", "v"})
LEAF = re.compile(rf"\b({'|'.join(PARTS)})\b|\bblocks/|\blora_[ab]\b")
FACTOR = re.compile(r"\d+ ?\*\*? ?[\w.]*\b(emb_dim|width)\b|\b(emb_dim|width) ?\* ?\d|emb_dim ?// ?[\w.]*n_heads")


def problems(text):
    """Leaves named in string constants other than docstrings, and factors of shapes in the code."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    code = re.sub(r'"""[\s\S]*?"""|#.*', "", text)
    return [*(s for s in strings if s not in docstrings and LEAF.search(s)), *FACTOR.findall(code)]


def test_no_other_module_names_a_leaf_or_a_factor_of_a_shape():
    assert problems('x = params["blocks"]["attn"]["out_proj"]') == ["out_proj"]
    assert problems("n = 4 * cfg.emb_dim") != []
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    found = {name: problems(path.read_text()) for name, path in paths.items() if not name.startswith(KNOW)}
    assert {name: strings for name, strings in found.items() if strings} == {}
