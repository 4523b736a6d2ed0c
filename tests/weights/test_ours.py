"""What must hold of our own checkpoints as weights: damage of any kind is reported in one line."""

import json
import shutil

import jax
import pytest
from refusals import refused

from slm_jax.model import GPTConfig, init_params
from slm_jax.runs import Run, load_gpt2, save_run
from slm_jax.tokenizer import CharTokenizer
from slm_jax.training.checkpoint import CHECKSUMS, METADATA, write_checksums

CFG = GPTConfig(vocab_size=5, context_length=4, emb_dim=8, n_heads=2, n_layers=1, unroll=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with one checkpoint, of step 0."""
    folder = tmp_path_factory.mktemp("runs") / "made"
    params = init_params(CFG, jax.random.key(0))
    save_run(folder, Run(folder, None, CFG, params, CharTokenizer("abcd")))
    return folder


@pytest.fixture
def step(made, tmp_path):
    """The checkpoint's folder, in a copy of the run."""
    return shutil.copytree(made, tmp_path / "run") / "checkpoints" / "0"


def change(step, edit):
    """Edit the metadata's content."""
    content = json.loads((step / METADATA).read_text())
    edit(content["custom_metadata"])
    (step / METADATA).write_text(json.dumps(content))


def refusal(step):
    with refused("other step") as caught:
        load_gpt2(step.parent.parent)
    assert str(step) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda metadata: metadata.pop("model"),
        lambda metadata: metadata["model"].update(vocab_size=10**30),
        lambda metadata: metadata.update(validation_loss="low"),
    ],
    ids=["none", "huge", "loss"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's other reads, given up
def test_metadata_that_were_edited_are_refused(edit, step):
    change(step, edit)
    refusal(step)  # by their checksum, mostly
    write_checksums(step)
    refusal(step)
    (step / CHECKSUMS).unlink()
    refusal(step)


def test_changed_metadata_are_called_damaged_before_they_are_believed(step):
    change(step, lambda metadata: metadata["model"].update(rotary=True))
    assert f"{step / METADATA} is damaged" in refusal(step)
    write_checksums(step)
    assert "rotary" in refusal(step)
