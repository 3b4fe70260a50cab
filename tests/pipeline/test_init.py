"""`--init`: pipelines written for models and data."""

import re
from pathlib import Path

from rlhf_recipes.core.errors import LabelsMissingError, RecipeError
from rlhf_recipes.core.files import read_json
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.feedback.labels import Label, Store
from rlhf_recipes.pipeline.checks import check_arguments
from rlhf_recipes.pipeline.early import check_stage_inputs, check_stage_keys
from rlhf_recipes.pipeline.init import init_pipeline
from rlhf_recipes.pipeline.reading import read_stages
from rlhf_recipes.pipeline.running import read_pipeline
from support import ROOT, run_recipe
from support.data_files import bot, user, write_rows

import pytest
from transformers import AutoTokenizer, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

TINY = resolve_path("rlhf_recipes.tiny.base")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2048}
QUESTIONS = [f"Where does number {number} live?" for number in range(40)]
DATA = {
    "demonstrations.csv": [{"prompt": one, "completion": "In a town."} for one in QUESTIONS],
    "conversations.jsonl": [{"messages": [user(one), bot("In a town.")]} for one in QUESTIONS],
    "pairs.jsonl": [{"prompt": one, "chosen": " In a town.", "rejected": " No."} for one in QUESTIONS],
    "rankings.jsonl": [{"prompt": one, "completions": [" A.", " B.", " C."], "ranks": [1, 0, 2]} for one in QUESTIONS],
    "references.jsonl": [{"prompt": one, "reference": "town"} for one in QUESTIONS],
    "prompts.jsonl": [{"prompt": one} for one in QUESTIONS],
}
ALL = ["sft", "reward", "ppo", "dpo", "evaluate"]
CASES = {
    "demonstrations.csv": ["sft", "sample", "evaluate"],
    "conversations.jsonl": ["sft", "sample", "evaluate"],
    "pairs.jsonl": ALL,
    "rankings.jsonl": ALL,
    "references.jsonl": ["ppo", "evaluate"],
    "prompts.jsonl": ["sample", "rank", "reward", "ppo", "dpo", "evaluate"],
    "demonstrations.csv pairs.jsonl": ALL,
}


def save_model(family: str) -> str:
    """Save the configuration and tokenizer of a random model of a family; return its folder."""
    config = {
        "llama": LlamaConfig(**SIZES, max_position_embeddings=128),
        "gpt2": GPT2Config(vocab_size=2048, n_positions=64, n_embd=64, n_layer=2, n_head=2),
        "gemma": Gemma3TextConfig(**SIZES, max_position_embeddings=256),
        "qwen": Qwen3Config(**SIZES, max_position_embeddings=512),
    }[family]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = None if family == "gpt2" else TEMPLATE
    if family == "gemma":
        tokenizer.eos_token = None
    config.save_pretrained(family)
    tokenizer.save_pretrained(family)
    return family


def init(model, files, card=None, name="my.yaml"):
    names = files.split()
    for one in names:
        if one in DATA:
            write_rows(Path(one), DATA[one])
    return "\n".join(init_pipeline(Path(name), model, names, card))


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "qwen"])
@pytest.mark.parametrize("files", CASES)
@pytest.mark.parametrize("card", [None, 12.0])
def test_what_is_written_is_a_pipeline_that_passes_all_checks(family, files, card, capsys):
    init(save_model(family), files, card)
    file = read_stages(Path("my.yaml"), ROOT / "recipes")
    check_stage_keys(file)
    check_stage_inputs(file, file.stages)
    pipeline = read_pipeline(Path("my.yaml"), ROOT / "recipes")
    check_arguments(pipeline)
    assert [stage.name for stage in pipeline.stages] == CASES[files]
    context = {"llama": 128, "gpt2": 64, "gemma": 256, "qwen": 512}[family]
    for stage in pipeline.stages:
        assert stage.values.get("max_length", 0) <= context
        assert stage.values.get("max_prompt_length", 0) + stage.values.get("max_completion_length", 0) <= context
        assert stage.values["dtype"] == ("bfloat16" if card else "float32")
        assert (stage.plan is not None) == bool(card and family != "gpt2" and stage.recipe != "rank")
    if family != "gpt2":  # the plan does not know its layers, as `--init` says
        run_recipe("plan", "--config", "my.yaml")
        assert "peak" in capsys.readouterr().out


def test_the_card_chooses_batch_sizes_and_keeps_the_rows_of_a_step():
    init(save_model("llama"), "pairs.jsonl", 12.0)
    (sft, *_), written = read_pipeline(Path("my.yaml"), ROOT / "recipes").stages, read_yaml(Path("my.yaml"))["stages"][0]
    rows = "per_device_train_batch_size", "gradient_accumulation_steps"
    assert sft.autofitted[rows[0]] > written["config"][rows[0]]
    assert sft.values[rows[0]] * sft.values[rows[1]] == written["config"][rows[0]] * written["config"][rows[1]]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["llama, ", "context of 128 tokens", "it has a chat template", "answers end with"]),
        ("gpt2", ["gpt2, ", "context of 64 tokens, beyond which it has no positions", "no chat template"]),
        ("gemma", ["gemma3_text, ", "names no EOS: `eos_token` is set to </s>"]),
    ],
)
def test_it_says_what_it_found_in_a_model(family, expected):
    printed = init(save_model(family), "pairs.jsonl")
    assert not [text for text in expected if text not in printed]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("demonstrations.csv", ["40 rows of demonstrations, as messages", "missing for reward, ppo and dpo", "label.py"]),
        ("references.jsonl", ["with references", "missing for sft: demonstrations", "missing for reward and dpo"]),
        ("prompts.jsonl", ["missing for sft: demonstrations", "`rank` waits for you", "--store runs/my.labels.sqlite"]),
        ("conversations.jsonl rankings.jsonl", ["warning: some files have messages"]),
    ],
)
def test_it_says_what_is_missing(files, expected):
    printed = init(save_model("llama"), files)
    assert not [text for text in expected if text not in printed]


@pytest.mark.parametrize(
    ("prompts", "held_out", "leaked"),
    [
        ([one for one in QUESTIONS[:10] for _ in range(3)], 9, 0),  # 8 would tear one apart
        (QUESTIONS[:15] * 2, 8, 8),
    ],
)
def test_rows_of_a_prompt_are_held_out_together(prompts, held_out, leaked):
    rows = [{"prompt": one, "chosen": f" In town {number}.", "rejected": " No."} for number, one in enumerate(prompts)]
    write_rows(Path("mine.jsonl"), rows)
    printed = init(save_model("llama"), "mine.jsonl")
    assert f"train[{30 - held_out}:]" in Path("my.yaml").read_text()
    assert (f"{leaked} of the {held_out} held-out prompts are trained on too" in printed) == bool(leaked)
    assert (f"of their prompts {leaked} are trained on too" in Path("my.yaml").read_text()) == bool(leaked)


@pytest.mark.parametrize(("family", "column"), [("llama", "instruction"), ("gpt2", "prompt")])
def test_other_names_of_columns_are_mapped_and_shown(family, column):
    write_rows(Path("popqa.jsonl"), [{"question": one, "answers": ["town", "a town"]} for one in QUESTIONS])
    assert f"read as question -> {column}, answers -> reference" in init(save_model(family), "popqa.jsonl")
    (ppo, _) = read_pipeline(Path("my.yaml"), ROOT / "recipes").stages
    assert ppo.values["datasets"][0]["column_mapping"] == {"question": column, "answers": "reference"}


@pytest.mark.parametrize(
    ("model", "files", "expected"),
    [
        ("llama", "odd.jsonl", "odd.jsonl: the columns are here"),
        ("llama", "nothing.jsonl", "nothing.jsonl"),
        ("some/model", "pairs.jsonl", "the Hub could not be reached"),
    ],
)
def test_what_cannot_be_looked_at_is_said(model, files, expected):
    save_model("llama")
    write_rows(Path("odd.jsonl"), [{"here": one} for one in QUESTIONS])
    with pytest.raises(RecipeError, match=re.escape(expected)):
        init(model, files)
    assert not Path("my.yaml").exists()


def test_rows_that_are_too_long_are_counted():
    long = "word " * 400
    rows = [
        {"prompt": one, "chosen": f" {long if n % 4 == 0 else 'In a town.'}", "rejected": " No."}
        for n, one in enumerate(QUESTIONS)
    ]
    write_rows(Path("mine.jsonl"), rows)
    assert "warning: mine.jsonl: 10 of 40 rows are longer than 128 tokens" in init(save_model("llama"), "mine.jsonl")
    write_rows(Path("mine.jsonl"), [row | {"chosen": long} for row in rows])
    with pytest.raises(RecipeError, match=r"mine\.jsonl: all rows are longer than 128 tokens"):
        init("llama", "mine.jsonl", name="other.yaml")


def test_few_rows_and_references_that_are_not_held_out():
    save_model("llama")
    write_rows(Path("mine.jsonl"), DATA["pairs.jsonl"][:9])
    with pytest.raises(RecipeError, match=r"mine\.jsonl: 9 rows are too few"):
        init("llama", "mine.jsonl")
    write_rows(Path("half.jsonl"), [{"prompt": one, "reference": "town" if n < 20 else ""} for n, one in enumerate(QUESTIONS)])
    assert "without references" in init("llama", "half.jsonl")  # none in the rows that are held out


@pytest.mark.parametrize(
    ("name", "model"), [("my #1.yaml", "llama"), ("my: x.yaml", "llama"), ("my.yaml", "2024"), ("my.yaml", "1e5")]
)
def test_names_that_yaml_would_read_otherwise_are_quoted(name, model):
    save_model("llama")
    if model != "llama":
        Path("llama").rename(model)
    init(model, "pairs.jsonl", name=name)
    pipeline = read_pipeline(Path(name), ROOT / "recipes")
    assert pipeline.folder == Path("runs") / Path(name).stem
    assert pipeline.stages[0].values["model_name_or_path"] == model
    check_arguments(pipeline)


def test_no_file_is_overwritten():
    Path("my.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"my\.yaml: exists"):
        init("anything", "pairs.jsonl")
    assert Path("my.yaml").read_text() == "mine"


@pytest.mark.slow
def test_thirty_pairs_really_train_on_a_cpu():
    rows = [{"prompt": one, "chosen": "I do not know .", "rejected": "no"} for one in QUESTIONS[:30]]
    write_rows(Path("mine.jsonl"), rows)
    init(TINY, "mine.jsonl")
    run_recipe("pipeline", "--config", "my.yaml")
    losses = [entry["eval_loss"] for entry in read_json(Path("runs/my/sft/recipe.json"))["log"] if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    policies = read_json(Path("runs/my/evaluate/metrics.json"))["policies"]
    assert {*policies} == {"base", "sft", "dpo", "ppo"}


@pytest.mark.slow
def test_questions_alone_become_a_reward_model_once_people_have_ranked(capsys):
    write_rows(Path("mine.jsonl"), DATA["prompts.jsonl"])
    printed = init(TINY, "mine.jsonl")
    few = ["--stages", "sample,rank,reward", "--set", "reward.num_train_epochs=1"]  # PPO is in the test above
    with pytest.raises(SystemExit) as stop:
        run_recipe("pipeline", "--config", "my.yaml", *few)
    assert stop.value.code == LabelsMissingError.STATUS
    assert capsys.readouterr().err.splitlines()[-1].startswith("waiting: stages: rank needs labels of people")
    store = re.search(r"label.py --store (\S+)`", printed)[1]
    with Store(store) as labels:
        while group := labels.claim("anna"):
            lengths = [len(str(answer)) for answer in group.completions]
            labels.save(Label(group.id, "anna", [sorted(lengths).index(one) + 1 for one in lengths]))
    run_recipe("pipeline", "--config", "my.yaml", *few)
    assert len(read_json(Path("runs/my/rank/rank.json"))["labellers"]) == 1
    assert read_json(Path("runs/my/reward/recipe.json"))
