"""What must hold of PyTorch's files, where PyTorch is there to read them: safely, or not at all."""

import warnings
import zipfile

import jax
import numpy as np
import pytest
from foreign_files import CONFIG, HEADS, LAYERS, WIDTH, book, huggingface, nanogpt, write
from refusals import refused

from slm_jax.errors import InputError
from slm_jax.runs import load_gpt2

torch = pytest.importorskip("torch")


def as_torch(tensors):
    return {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}


def assert_same_as(params, tensors, tmp_path):
    expected = load_gpt2(write(tmp_path / "expected", tensors), n_heads=HEADS)[1]
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint(bias, tmp_path):
    tensors = nanogpt(bias)
    args = {
        "n_layer": LAYERS, "n_head": 2, "n_embd": WIDTH, "block_size": 10, "bias": bias, "vocab_size": 29,
        "dropout": 0.2,
    }  # fmt: skip
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in as_torch(tensors).items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "model_args": args,
        "iter_num": 5,
        "best_val_loss": torch.tensor(2.5),
    }
    torch.save(content, tmp_path / "ckpt.pt")
    cfg, params = load_gpt2(tmp_path)
    assert (cfg.n_heads, cfg.bias, cfg.tie_weights, cfg.context_length) == (2, bias, True, 10)
    assert_same_as(params, tensors, tmp_path)
    content["model_args"] = args | {"n_layer": 7}
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="n_layers is 7"):
        load_gpt2(tmp_path)
    content["model_args"] = args | {"n_head": None}
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="model_args has a NoneType for n_heads"):
        load_gpt2(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_the_books_file(zipped, nested, tmp_path):
    tensors = book()
    content = {"model_state_dict": as_torch(tensors), "optimizer_state_dict": {}} if nested else as_torch(tensors)
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    assert_same_as(load_gpt2(tmp_path / "model.pth", n_heads=HEADS)[1], tensors, tmp_path)


def test_hugging_faces_old_file_also_in_bfloat16(tmp_path):
    tensors = huggingface(prefix="transformer.")
    folder = write(tmp_path / "hf", tensors, CONFIG)
    (folder / "model.safetensors").unlink()
    torch.save({name: tensor.bfloat16() for name, tensor in as_torch(tensors).items()}, folder / "pytorch_model.bin")
    cfg, params = load_gpt2(folder, param_dtype="bfloat16")
    assert cfg.n_heads == HEADS
    expected = torch.from_numpy(tensors["transformer.wte.weight"]).bfloat16().float().numpy()
    np.testing.assert_array_equal(np.asarray(params["tok_emb"]["embedding"], np.float32), expected)


class Harmful:
    """An object that would run code when it is unpickled."""

    def __reduce__(self):
        return (open, ("was-here", "w"))


@pytest.mark.hostile
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_objects_is_not_executed(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=zipped)
    with refused(r"ckpt\.pt.*weights_only"):
        load_gpt2(tmp_path / "ckpt.pt")
    assert not (tmp_path / "was-here").exists()


def test_what_is_no_state_dict_is_named(tmp_path):
    file = tmp_path / "model.pth"
    for content, expected in (([1, 2], "no state dict"), ({}, "no state dict"), ({"epoch": 3}, "'epoch' is a int")):
        torch.save(content, file)
        with pytest.raises(InputError, match=expected):
            load_gpt2(file)
    torch.save(as_torch(book()), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        load_gpt2(file)
    quantised = as_torch(huggingface()) | {"h.0.ln_1.bias": torch.ones(WIDTH, dtype=torch.int8)}
    torch.save(quantised, file)
    with pytest.raises(InputError, match=r"h\.0\.ln_1\.bias is int8"):
        load_gpt2(file, n_heads=HEADS)


@pytest.mark.hostile
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: torch.nested.nested_tensor(list(tensor)),
    ],
    ids=["sparse", "meta", "nested"],
)
def test_a_tensor_that_is_not_dense_numbers_is_named(change, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = as_torch(nanogpt())
        tensors["transformer.wpe.weight"] = change(tensors["transformer.wpe.weight"])
        torch.save(tensors, tmp_path / "ckpt.pt")
    capfd.readouterr()
    with refused(r"transformer\.wpe\.weight|weights_only"):
        load_gpt2(tmp_path, n_heads=HEADS)
    assert capfd.readouterr().err == ""


def test_a_view_that_negates_is_read_as_what_it_shows(tmp_path):
    tensors = as_torch(nanogpt())
    shown = tensors["transformer.wpe.weight"].bfloat16()
    negated = torch._neg_view(shown)
    assert negated.is_neg()
    torch.save(tensors | {"transformer.wpe.weight": negated}, tmp_path / "ckpt.pt")
    _, params = load_gpt2(tmp_path, n_heads=HEADS)
    np.testing.assert_array_equal(params["pos_emb"]["embedding"], -shown.float().numpy())


def test_a_flipped_bit_in_a_zip_file_is_found(tmp_path):
    torch.save(as_torch(nanogpt()), tmp_path / "ckpt.pt")
    with zipfile.ZipFile(tmp_path / "ckpt.pt") as archive:
        tensors = [member for member in archive.infolist() if "/data/" in member.filename]
        content = archive.read(max(tensors, key=lambda member: member.file_size))
    whole = (tmp_path / "ckpt.pt").read_bytes()
    at = whole.index(content) + len(content) // 2 // 4 * 4
    (tmp_path / "ckpt.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with refused(r"ckpt\.pt: damaged: .*data/"):
        load_gpt2(tmp_path, n_heads=HEADS)
