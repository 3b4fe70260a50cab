"""`Similarity` against hidden states and logits that plain Transformers computes, on small models saved here."""

import importlib.util
import json
import logging
from pathlib import Path

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.rewards.reward_funcs import load_rewards
from rlhf_recipes.rewards.similarity import Similarity

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cosine_similarity
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "away", "ça", "一"]
IDS = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
TEXTS = ["the cat sat", "a dog ran far away on the mat", "ça 一", "cat", "the dog sat on the cat on a mat far away"]
REFERENCES = ["the cat sat on a mat", "a dog", "the cat ran", "cat", "ça 一 unheard-of"]


def save_tokenizer(path, **options):
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    options = {"pad_token": "[PAD]", "model_input_names": inputs} | options
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", **options
    ).save_pretrained(path)


def save_model(path, architecture=BertModel, tokenizer=True, **options):
    """Save and return a small BERT with random weights large enough for scores to differ."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(IDS), max_position_embeddings=24, initializer_range=0.5, **sizes, **options)
    model = architecture(config).eval()
    model.save_pretrained(path)
    if tokenizer:
        save_tokenizer(path)
    return model


@pytest.fixture(params=["mean", "cls"])
def embedding(tmp_path, request):
    """A model in the format of sentence-transformers, its pooling and its folder."""
    model = save_model(tmp_path / "bert")
    words = Transformer(str(tmp_path / "bert"))
    pooling = Pooling(16, pooling_mode=request.param)
    SentenceTransformer(modules=[words, pooling], device="cpu").save(str(tmp_path / "embedding"))
    return model, request.param, str(tmp_path / "embedding")


def tokens(text):
    return [IDS.get(word, 1) for word in text.split()]


@torch.no_grad()
def pooled(model, pooling, text):
    states = model(input_ids=torch.tensor([[2, *tokens(text), 3]])).last_hidden_state[0]
    return states.mean(0) if pooling == "mean" else states[0]


@torch.no_grad()
def logits(model, first, second):
    first, second = [2, *tokens(first), 3], [*tokens(second), 3]
    types = torch.tensor([[0] * len(first) + [1] * len(second)])
    return model(input_ids=torch.tensor([first + second]), token_type_ids=types).logits[0]


def test_embedding_score_is_the_cosine_after_the_saved_pooling(embedding):
    model, pooling, path = embedding
    expected = [
        cosine_similarity(pooled(model, pooling, text), pooled(model, pooling, truth), dim=0).item()
        for text, truth in zip(TEXTS, REFERENCES, strict=True)
    ]
    conversations = [[{"role": "assistant", "content": text}] for text in TEXTS]
    scores = Similarity(path, "embedding")(completions=conversations, reference=REFERENCES)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert max(scores) - min(scores) > 0.1
    assert Similarity(path, "embedding")(completions=REFERENCES, reference=TEXTS) == pytest.approx(scores, abs=1e-6)
    assert Similarity(path, "embedding")(completions=TEXTS, reference=TEXTS) == pytest.approx([1.0] * 5, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "score"),
    [
        ({"num_labels": 1}, lambda row: row[0].sigmoid()),
        ({"num_labels": 1, "problem_type": "regression"}, lambda row: row[0]),
        ({"id2label": {0: "not_equivalent", 1: "Equivalent"}}, lambda row: row.softmax(-1)[1]),
        ({"id2label": {0: "contradiction", 1: "neutral", 2: "ENTAILMENT"}}, lambda row: row.softmax(-1)[2]),
        ({"id2label": {0: "entailment", 1: "not_entailment", 2: "neutral"}}, lambda row: row.softmax(-1)[0]),
    ],
)
def test_cross_encoder_takes_the_lower_score_of_both_orders(tmp_path, options, score):
    model = save_model(tmp_path, BertForSequenceClassification, **options)
    orders = [
        [score(logits(model, *pair)).item() for pair in zip(*texts, strict=True)]
        for texts in ((TEXTS, REFERENCES), (REFERENCES, TEXTS))
    ]
    expected = [min(pair) for pair in zip(*orders, strict=True)]
    assert expected not in orders  # both orders matter
    scores = Similarity(str(tmp_path), "cross-encoder")(completions=TEXTS, reference=REFERENCES)
    assert scores == pytest.approx(expected, abs=1e-5)
    for batch_size in (1, 3):
        batched = Similarity(str(tmp_path), "cross-encoder", batch_size=batch_size)(completions=TEXTS, reference=REFERENCES)
        assert batched == pytest.approx(scores, abs=1e-5)


def test_empty_completions_score_0_and_rows_without_a_reference_none(embedding):
    reward = Similarity(embedding[2], "embedding", batch_size=1)
    mixed = reward(
        completions=["", TEXTS[0], TEXTS[1], " ", TEXTS[2]], reference=["cat", REFERENCES[0], None, None, REFERENCES[2]]
    )
    first, second = reward(completions=[TEXTS[0], TEXTS[2]], reference=[REFERENCES[0], REFERENCES[2]])
    assert mixed == [0.0, pytest.approx(first, abs=1e-6), None, None, pytest.approx(second, abs=1e-6)]
    assert Similarity("nowhere", "embedding")(completions=["", "a"], reference=["a", None]) == [0.0, None]


def test_best_of_several_references_counts(embedding):
    reward = Similarity(embedding[2], "embedding")
    alone = [reward(["the cat sat"], reference=[one])[0] for one in REFERENCES[:3]]
    several = reward(["the cat sat", "", "a dog", "a dog"], reference=[REFERENCES[:3], ["cat", "dog"], [], "dog"])
    assert several == [pytest.approx(max(alone), abs=1e-5), 0.0, None, pytest.approx(reward(["a dog"], reference=["dog"])[0])]


def test_reference_column_is_needed():
    with pytest.raises(RecipeError, match=r"^Similarity: .*`reference`"):
        Similarity("nowhere", "embedding")(completions=["a"])


def test_long_texts_are_truncated(embedding):
    path = embedding[2]
    assert Similarity(path, "embedding", max_length=4)(completions=["the cat sat on"], reference=["the cat"]) == [
        pytest.approx(1.0, abs=1e-5)
    ]
    # the model has 24 positions, two of them for [CLS] and [SEP]
    assert Similarity(path, "embedding")(completions=["dog " * 40], reference=["dog " * 22]) == [pytest.approx(1.0, abs=1e-5)]


def refused(path, kind="embedding"):
    with pytest.raises(RecipeError, match=f"^Similarity: model_name_or_path: {path}: ") as error:
        Similarity(str(path), kind)(completions=["cat"], reference=["dog"])
    return str(error.value)


def test_models_that_cannot_compare_are_refused(tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere")
    save_model(tmp_path / "bare")
    assert "not a cross-encoder: its files lack classifier.bias" in refused(tmp_path / "bare", "cross-encoder")
    save_model(tmp_path / "unnamed", BertForSequenceClassification, num_labels=2)
    assert "LABEL_0, LABEL_1" in refused(tmp_path / "unnamed", "cross-encoder")
    save_model(tmp_path / "mute", tokenizer=False)
    assert "tokenizer" in refused(tmp_path / "mute")


@pytest.mark.parametrize("kind", ["embedding", "cross-encoder"])
def test_weights_that_would_be_random_are_refused(tmp_path, kind):
    model = save_model(tmp_path, BertModel if kind == "embedding" else BertForSequenceClassification, num_labels=1)
    weights = model.state_dict()
    lost = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    save_file({name: weight for name, weight in weights.items() if name != lost}, tmp_path / "model.safetensors")
    assert lost in refused(tmp_path, kind)


def test_weights_in_a_folder_of_their_own(embedding):
    """Older versions of sentence-transformers saved them in `0_Transformer`."""
    _, _, path = embedding
    truth = Similarity(path, "embedding")(TEXTS, reference=REFERENCES)
    path = Path(path)
    (path / "0_Transformer").mkdir()
    for file in path.glob("*.*"):
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            file.rename(path / "0_Transformer" / file.name)
    modules = json.loads((path / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (path / "modules.json").write_text(json.dumps(modules))
    assert Similarity(str(path), "embedding")(TEXTS, reference=REFERENCES) == pytest.approx(truth)
    file = path / "0_Transformer" / "model.safetensors"
    weights = load_file(file)
    del weights["embeddings.LayerNorm.weight"]
    save_file(weights, file)
    assert "embeddings.LayerNorm.weight" in refused(path)


def test_static_embeddings_have_no_transformer_to_check(tmp_path):
    words = Tokenizer(models.WordLevel(IDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    module = StaticEmbedding(words, embedding_dim=8)
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path))
    vectors = [module.embedding.weight[tokens(text)].mean(0) for text in ("the cat", "a dog ran")]
    scores = Similarity(str(tmp_path), "embedding", max_length=2)(["the cat"], reference=["a dog ran"])
    assert scores == [pytest.approx(cosine_similarity(*vectors, dim=0).item(), abs=1e-5)]


def test_network_is_in_memory_once(embedding, monkeypatch):
    """The report of missing weights comes from a copy without memory."""
    devices, load = [], BertModel.from_pretrained

    def loaded(*args, **options):
        result = load(*args, **options)
        devices.append((result[0] if isinstance(result, tuple) else result).device.type)
        return result

    monkeypatch.setattr(BertModel, "from_pretrained", loaded)
    Similarity(embedding[2], "embedding")(TEXTS, reference=REFERENCES)
    assert devices == ["cpu", "meta"]


def test_pickled_weights_are_refused(tmp_path):
    model = save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "model.safetensors" in refused(tmp_path)


def test_missing_extra_is_one_message_before_anything_is_loaded(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "sentence" in name else find(name))
    with pytest.raises(RecipeError, match=r"sentence-transformers.*pip install .*\[similarity\]"):
        load_rewards(
            [{"path": "rlhf_recipes.rewards.Similarity", "arguments": {"model_name_or_path": "x", "kind": "embedding"}}]
        )


def test_folder_without_pooling_is_warned_of(tmp_path, caplog):
    save_model(tmp_path)
    with caplog.at_level(logging.WARNING):
        Similarity(str(tmp_path), "embedding")(completions=["cat"], reference=["dog"])
    assert "mean pooling" in caplog.text
