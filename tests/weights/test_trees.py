"""What must hold of a params tree in a file: it comes back unchanged, or the error names what is wrong with it."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from slm_jax.errors import InputError, MissingInputError
from slm_jax.weights import trees
from slm_jax.weights.trees import DIGESTS, read_tree, tree_fingerprint, write_tree

TREE = {
    "scale": np.float32(0.5),
    "blocks": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4).swapaxes(1, 2)},
    "half": jnp.linspace(0, 1, 7, dtype=jnp.bfloat16),
    "one": np.ones(1, np.int32),
}


@pytest.fixture
def file(tmp_path):
    return write_tree(tmp_path / "params.safetensors", TREE)


def test_a_tree_comes_back_as_it_was_and_its_fingerprint_is_of_the_contents(file, tmp_path):
    """A scalar as a scalar, a matrix that is not contiguous, bfloat16 in its bits."""
    found, expected = flatten_dict(read_tree(file)), flatten_dict(TREE)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert (found[path].shape, found[path].dtype) == (leaf.shape, leaf.dtype)
        assert found[path].tobytes() == np.asarray(leaf).tobytes()
    assert found["half",].dtype == ml_dtypes.bfloat16
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    (file.parent / "plain").touch()
    assert file.stat().st_mode == (file.parent / "plain").stat().st_mode  # others may read it as any file
    again = write_tree(tmp_path / "again", TREE)
    other = write_tree(tmp_path / "other", {**TREE, "scale": np.float32(0.25)})
    assert tree_fingerprint(file) == tree_fingerprint(again) != tree_fingerprint(other)


def test_every_damage_and_another_programs_tensors_are_refused(file):
    whole = file.read_bytes()
    changed = whole[:-1] + bytes([whole[-1] ^ 1])  # of the last leaf
    for content, problem in (
        (b"", ""),
        (whole[:-1], ""),
        (whole + b"\0", ""),
        (changed, "(scale|kernel|half|one) is d"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=rf"params\.safetensors: {problem}"):
            read_tree(file)

    save_file({}, file, {DIGESTS: json.dumps({"a": "0" * 64})})
    with pytest.raises(InputError, match=r"a is missing"):
        read_tree(file)
    with pytest.raises(MissingInputError, match=r"nothing: no such file"):
        read_tree(file.with_name("nothing"))
    save_file({"a": np.ones(2, np.float32)}, file)
    for read in (read_tree, tree_fingerprint):
        with pytest.raises(InputError, match=r"params\.safetensors: cannot be read as parameters of slm_jax"):
            read(file)


def test_a_place_that_cannot_be_written_says_why_and_keeps_the_file(file, monkeypatch):
    def fail(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    before = file.read_bytes()
    monkeypatch.setattr(trees, "save_file", fail)
    with pytest.raises(OSError, match=r"No space left on device.*params\.safetensors"):
        write_tree(file, {"one": np.ones(1)})
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before
