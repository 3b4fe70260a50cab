"""Which base an adapter was trained on: equal fingerprints for the same base, however it was loaded, and refusals."""

import copy

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.models.fingerprint import check_base, fingerprint
from rlhf_recipes.models.loading import load_model

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import ModelConfig, SFTConfig

BASE = resolve_path("rlhf_recipes.tiny.base")
IN_4_BITS = {"load_in_4bit": True, "use_bnb_nested_quant": True}


def load_base(name=BASE, **options):
    """The tiny base, under another name if one is given."""
    model = load_model(ModelConfig(BASE, **options), SFTConfig(bf16=False))
    model.config._name_or_path = model.name_or_path = name
    return model


def adapted(**options):
    torch.manual_seed(0)
    return get_peft_model(load_base(), LoraConfig(r=2, init_lora_weights=False, **options))


@pytest.fixture(scope="module")
def record():
    """Content of the record beside an adapter."""
    return {"base_model": {"name": BASE, "fingerprint": fingerprint(load_base())}}


def refused(record, model, difference, trained_on=BASE):
    with pytest.raises(RecipeError) as error:
        check_base("start_from: sft", trained_on, record, model)
    assert str(error.value).startswith(f"start_from: sft: was trained on {trained_on}, and the base in memory")
    assert difference in str(error.value)


def test_fingerprint_does_not_depend_on_loading(record):
    expected = record["base_model"]["fingerprint"]
    assert expected["weights"]
    assert expected["matrices"]
    classifier = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1)
    embedding = adapted(target_modules=["embed_tokens", "q_proj"], modules_to_save=["norm"])
    for model in (load_base(dtype="bfloat16"), classifier, adapted(target_modules=["v_proj"]), embedding):
        assert fingerprint(model) == expected
    for options in ({}, {"dtype": "bfloat16"}):
        assert fingerprint(load_base(**IN_4_BITS, **options)) == expected | {"matrices": None}
    assert fingerprint(load_base(dtype="float16")) == expected | {"weights": None, "matrices": None}


@pytest.mark.parametrize("weight", ["model.embed_tokens.weight", "model.layers.2.input_layernorm.weight"])
def test_base_with_other_weights_is_refused_under_the_same_name(record, weight):
    other = load_base()
    other.get_parameter(weight).data.view(-1)[-1] += 0.5
    refused(record, other, f", {BASE}, is another: other weights. ")


def test_base_of_other_dimensions_is_refused(record):
    config = copy.deepcopy(load_base().config)
    config.num_hidden_layers = 2
    config._name_or_path = "small"
    refused(record, AutoModelForCausalLM.from_config(config), ", small, is another: num_hidden_layers 4 against 2. ")


def test_base_that_an_adapter_was_merged_into_is_refused(record):
    """It has the same embeddings and norms."""
    refused(record, adapted(target_modules=["q_proj"]).merge_and_unload(), "is another: other weights in the linear layers. ")


def test_4_bit_base_of_another_name_is_warned_of(record, caplog):
    """Its linear layers cannot be compared."""
    check_base("start_from: sft", BASE, record, load_base("/elsewhere/base"))
    check_base("start_from: sft", BASE, record, load_base(**IN_4_BITS))
    quantised = {"base_model": {"fingerprint": record["base_model"]["fingerprint"] | {"matrices": None}}}
    check_base("start_from: sft", BASE, quantised, load_base())
    assert not caplog.records
    check_base("start_from: sft", BASE, record, load_base("runs/sft-merged", **IN_4_BITS))
    (warning,) = caplog.messages
    assert warning.startswith(f"start_from: sft: was trained on {BASE}, and the base in memory is runs/sft-merged")


@pytest.mark.parametrize("named", ["somebody/other-model", None, ""])
def test_adapter_that_names_another_base_of_the_same_weights_is_said_to(record, caplog, named):
    check_base("start_from: sft", named, record, load_base())
    assert caplog.messages == [
        f"start_from: sft: was trained on {named}, and the base in memory is {BASE}, which has the same weights"
    ]


def test_where_weights_cannot_be_compared_the_name_decides(record):
    """fp16 is rounded differently than bf16."""
    check_base("start_from: sft", BASE, record, load_base(dtype="float16"))
    refused(record, load_base("another-base", dtype="float16"), "is another-base: their weights cannot be compared")
    check_base("start_from: sft", BASE, {}, load_base())
    refused({}, load_base(), "their weights cannot be compared", trained_on="somebody/other-model")
