"""The base: same weights every time, frozen, and whole again after it lent a longer vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from workbench.errors import DataError, ModelError
from workbench.training.base import load_base
from workbench.training.config import ModelSection


def classifier(path: Path, **section: object) -> ModelSection:
    return ModelSection(path=str(path), task="SEQ_CLS", **section)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_new_head_comes_from_the_seed_alone(bert_folder: Path) -> None:
    torch.manual_seed(99)
    first = load_base(classifier(bert_folder), ["no", "yes"], seed=3, device="cpu")
    torch.manual_seed(100)
    state = torch.get_rng_state()
    second = load_base(classifier(bert_folder), ["no", "yes"], seed=3, device="cpu")
    other = load_base(classifier(bert_folder), ["no", "yes"], seed=4, device="cpu")
    assert torch.equal(torch.get_rng_state(), state), "loading must not disturb the process's random numbers"
    assert_equal(tensors(first.model), tensors(second.model))
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert "classifier.weight" in first.fresh
    assert "bert.embeddings.word_embeddings.weight" not in first.fresh


def test_frozen_in_eval_mode_with_labels(bert_folder: Path) -> None:
    base = load_base(classifier(bert_folder), ["no", "yes", "maybe"], seed=0, device="cpu")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.labels == ["no", "yes", "maybe"]
    assert base.model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert base.model.classifier.out_features == 3


def test_fingerprint_knows_weights_and_labels_but_not_the_folder(bert_folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(bert_folder, tmp_path / "moved")
    base = load_base(classifier(bert_folder), ["no", "yes"], 0, "cpu")
    assert load_base(classifier(moved), ["no", "yes"], 0, "cpu").fingerprint == base.fingerprint
    assert load_base(classifier(bert_folder), ["yes", "no"], 0, "cpu").fingerprint != base.fingerprint
    changed = load_base(classifier(bert_folder, overrides={"hidden_act": "relu"}), ["no", "yes"], 0, "cpu")
    assert changed.fingerprint != base.fingerprint
    assert changed.model.config.hidden_act == "relu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(bert_folder: Path, dtype: str) -> None:
    base = load_base(classifier(bert_folder, dtype=dtype), ["no", "yes"], 0, "cpu")
    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}


def test_random_weights_need_no_weight_files(bert_folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(bert_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    first, second, other = (
        load_base(classifier(bare, weights="random"), ["no", "yes"], seed, "cpu") for seed in (0, 0, 1)
    )
    assert_equal(tensors(first.model), tensors(second.model))
    assert first.fingerprint != other.fingerprint


def test_decoder_without_padding_token_pads_with_end_of_text_on_the_right(llama_folder) -> None:
    base = load_base(ModelSection(path=str(llama_folder(True)), task="CAUSAL_LM"), None, 0, "cpu")
    assert base.tokenizer.pad_token == "[EOS]"
    assert base.tokenizer.padding_side == "right"
    assert base.model.config.pad_token_id == base.tokenizer.eos_token_id
    assert base.fresh == ()


def test_refusals_say_what_is_wrong(bert_folder: Path, tmp_path: Path) -> None:
    def message(**section: object) -> str:
        with pytest.raises(ModelError) as caught:
            load_base(ModelSection(**{"task": "SEQ_CLS", "path": str(bert_folder), **section}), ["no", "yes"], 0, "cpu")
        return str(caught.value)

    assert "neither a folder with a model nor a model on the Hugging Face hub" in message(path="nobody/nothing")
    assert "holds no config.json" in message(path=str(tmp_path))
    assert "no tokenizer can be loaded from 'nobody/nothing'" in message(tokenizer="nobody/nothing")
    assert "layers is no field of BertConfig" in message(overrides={"layers": 1})
    assert "lack" in message(task="CAUSAL_LM")
    assert "cannot be loaded for SEQ_2_SEQ_LM" in message(task="SEQ_2_SEQ_LM")

    damaged = shutil.copytree(bert_folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert "cannot be loaded for SEQ_CLS" in message(path=str(damaged))


def test_pickles_are_not_loaded(bert_folder: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(bert_folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="a pickle can run code"):
        load_base(classifier(pickled), ["no", "yes"], 0, "cpu")

    # nor when some other safetensors lie beside a pickle that would load
    model = load_base(classifier(bert_folder), ["no", "yes"], 0, "cpu").model
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    shutil.copy(bert_folder / "model.safetensors", pickled / "other.safetensors")
    with pytest.raises(ModelError, match="cannot be loaded for SEQ_CLS"):
        load_base(classifier(pickled), ["no", "yes"], 0, "cpu")


# ---------------------------------------------------------------- vocabulary


def load_all_kinds(kind: str, bert_folder: Path, llama_folder, t5_folder: Path):
    if kind == "encoder":
        return load_base(classifier(bert_folder), ["no", "yes"], 0, "cpu")
    if kind == "t5":
        return load_base(ModelSection(path=str(t5_folder), task="SEQ_2_SEQ_LM"), None, 0, "cpu")
    return load_base(ModelSection(path=str(llama_folder(kind == "tied")), task="CAUSAL_LM"), None, 0, "cpu")


@pytest.mark.parametrize("kind", ["encoder", "tied", "untied", "t5"])
def test_vocabulary_grows_and_the_base_is_whole_again(
    kind: str, bert_folder: Path, llama_folder, t5_folder: Path
) -> None:
    base = load_all_kinds(kind, bert_folder, llama_folder, t5_folder)
    model, old_rows = base.model, base.model.get_input_embeddings().weight.shape[0]
    before, places = tensors(model), {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    pieces = base.tokenizer("goodbad", add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    old_table = model.get_input_embeddings().weight.clone()

    with base.vocabulary(["goodbad", "filmB"]) as longer:
        table = model.get_input_embeddings().weight
        new = longer.tokenizer("the goodbad film", add_special_tokens=False)["input_ids"][1]
        assert longer.tokenizer.convert_ids_to_tokens(new) == "goodbad"
        assert torch.equal(table[new], old_table[pieces].mean(0))
        assert torch.equal(table[: len(base.tokenizer)], old_table[: len(base.tokenizer)])
        assert not table.requires_grad
        assert len(table) == model.config.vocab_size == max(old_rows, len(longer.tokenizer))
        if (output := model.get_output_embeddings()) is not None:
            assert output.out_features == len(output.weight) == len(table)
            assert (output.weight is table) == (kind in ("tied", "t5"))
            ids = torch.tensor([[new, 3]])
            assert model(input_ids=ids, labels=ids).logits.shape[-1] == len(table)
        else:
            model(input_ids=torch.tensor([[new, 3]]))
        assert "goodbad" not in base.tokenizer.get_vocab()

    assert_equal(tensors(model), before)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == places
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == old_rows


def test_vocabulary_is_restored_after_an_error(bert_folder: Path) -> None:
    base = load_base(classifier(bert_folder), ["no", "yes"], 0, "cpu")
    before = tensors(base.model)
    with pytest.raises(KeyError), base.vocabulary(["goodbad"]):
        raise KeyError
    assert_equal(tensors(base.model), before)


def test_no_new_tokens_is_the_base_itself(bert_folder: Path) -> None:
    base = load_base(classifier(bert_folder), ["no", "yes"], 0, "cpu")
    with base.vocabulary([]) as same:
        assert same is base


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(["good"], "is a token already"), (["goodbad", "goodbad"], "named twice"), ([" "], "leaves nothing")],
)
def test_vocabulary_refuses(bert_folder: Path, tokens: list[str], message: str) -> None:
    base = load_base(classifier(bert_folder), ["no", "yes"], 0, "cpu")
    with pytest.raises(DataError, match=message), base.vocabulary(tokens):
        pass
