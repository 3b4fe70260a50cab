"""The reward recipe from end to end: rankings, pairs, margins, ensembles, the start from SFT, and saved files."""

import gc
import itertools
import json
import shutil
import subprocess
import weakref
from types import SimpleNamespace

from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.config.ppo import PPOArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.data import load_data, load_demonstrations
from rlhf_recipes.models.loading import load_model
from rlhf_recipes.rewards import reward_models
from rlhf_recipes.rewards.saved import load_reward_adapter, load_saved_reward
from rlhf_recipes.tiny import splits
from rlhf_recipes.training.dependencies import run_dependencies
from support import NO_EVALUATION, ROOT

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification
from trl import ModelConfig, SFTConfig

BASE = resolve_path("rlhf_recipes.tiny.base")
NO_EVAL = (*NO_EVALUATION, "--save_strategy", "no")
IN_4_BITS = ("--load_in_4bit", "true", "--use_bnb_nested_quant", "true")
AS_IT_BEGINS = ("--learning_rate", 1e-12, "--max_steps", 1, "--save_strategy", "no")
LONG = ("--max_steps", 4, "--save_steps", 2, "--save_total_limit", 9, "--lora_dropout", 0.1, "--seed", 5)
ENSEMBLE = ("--ensemble_size", 2, "--ensemble_combine", "uncertainty", "--uncertainty_coef", 0.5)


# --- Runs, each once -----------------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(folder, *path):
    return json.loads(folder.joinpath(*path).read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder of data with a small version of the tiny YAML file."""
    folder = tmp_path_factory.mktemp("files")
    for split in ("train", "test"):
        write_rows(folder / f"rankings.{split}.jsonl", splits.rankings(split, rows=16, seed=3))
        pairs = splits.preferences(split, rows=16, seed=3).to_list()
        write_rows(folder / f"pairs.{split}.jsonl", pairs)
        write_rows(folder / f"margins.{split}.jsonl", [row | {"margin": n / 4} for n, row in enumerate(pairs)])
    write_rows(folder / "demonstrations.jsonl", splits.demonstrations(rows=16))
    write_rows(folder / "text.jsonl", [{"text": "Karimo lives in Alderby."}, {"text": "Bazepo is a baker."}])
    settings = yaml.safe_load((ROOT / "configs" / "tiny" / "reward.yaml").read_text())
    for key in ("needs", "datasets", "test_split_size", "eval_steps"):
        del settings[key]
    settings["dataset_name"] = str(folder / "rankings.train.jsonl")
    settings["eval_datasets"] = [{"path": str(folder / "rankings.test.jsonl")}]
    settings |= {"logging_steps": 1, "warmup_steps": 0, "max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 2}
    settings |= {"num_train_epochs": 1}
    (folder / "reward.yaml").write_text(yaml.safe_dump(settings | {"eval_strategy": "epoch", "disable_tqdm": True}))
    return folder


@pytest.fixture
def config(files, tmp_path):
    """Return a function that writes the YAML file with other values and returns options that name it."""

    def write(**values):
        settings = yaml.safe_load((files / "reward.yaml").read_text()) | values
        (tmp_path / "reward.yaml").write_text(yaml.safe_dump(settings))
        return "--config", tmp_path / "reward.yaml"

    return write


@pytest.fixture
def data_of(files, config):
    """Return a function that returns options naming the files of a kind of comparisons."""

    def options(kind):
        train, test = (str(files / f"{kind}.{split}.jsonl") for split in ("train", "test"))
        return config(dataset_name=train, eval_datasets=[{"path": test}])

    return options


@pytest.fixture
def reward(launch, files):
    """Return a function that runs the recipe and returns its exit status and last line on stderr."""

    def run(folder, *options):
        options = options if "--config" in options else ("--config", files / "reward.yaml", *options)
        status, error = launch("reward", *options, "--output_dir", folder)
        assert "Traceback" not in error
        assert status in (0, 2), error
        return status, (error.strip().splitlines() or [""])[-1]

    return run


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return {}, tmp_path_factory.mktemp("runs")


@pytest.fixture
def trained(reward, memory):
    """Return a function that trains once per name and returns the folder."""
    done, place = memory

    def run(name, *options):
        if name not in done:
            done[name] = place / name / "reward"
            status, error = reward(done[name], *options)
            assert status == 0, error
        return done[name]

    return run


@pytest.fixture
def sft(launch, files, memory):
    """Return a function that trains an SFT adapter of rank 3 and returns the folder."""
    done, place = memory
    small = ("--dataset_name", files / "demonstrations.jsonl", "--dataset_arguments", "none", *NO_EVAL, "--max_steps", 2)
    small = (*small, "--learning_rate", 1e-2, "--warmup_steps", 0, "--per_device_train_batch_size", 8, "--lora_r", 3)

    def run(name="sft", *options):
        if name not in done:
            status, error = launch("sft", *small, *options, "--output_dir", place / name)
            assert status == 0, error
            done[name] = place / name
        return done[name]

    return run


# --- Independent computations ----------------------------------------------------------------------------------


@torch.no_grad()
def raw_scores(folder, prompts, completions):
    """Return scores of answers by Transformers and PEFT alone, one conversation at a time."""
    if (folder / "adapter_config.json").exists():
        model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folder)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = tokenizer.apply_chat_template(prompt + completion, return_tensors="pt", return_dict=True)["input_ids"]
        scores.append(model.eval()(input_ids=ids).logits.item())
    return np.array(scores)


def flat(rankings):
    """Return prompts and completions of all answers."""
    pairs = [(row["prompt"], completion) for row in rankings for completion in row["completions"]]
    return [prompt for prompt, _ in pairs], [completion for _, completion in pairs]


def score_rankings(folder, rankings):
    """Return scores (rows, K) of rankings of K answers each."""
    return raw_scores(folder, *flat(rankings)).reshape(len(rankings), -1)


def differences(scores, ranks):
    """Return the score of the better answer minus that of the worse one, of every comparison."""
    return np.array(
        [
            row[better] - row[worse]
            for row, order in zip(scores, ranks, strict=True)
            for better, worse in itertools.permutations(range(len(order)), 2)
            if order[better] < order[worse]
        ]
    )


def as_rankings(pairs):
    return [{"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]], "ranks": [0, 1]} for r in pairs]


def best_answers(rankings):
    return [row["prompt"] for row in rankings], [row["completions"][np.argmin(row["ranks"])] for row in rankings]


def check_evaluation(result, scores, ranks):
    """Check a result in `evaluation.json` against the raw scores (rows, K); tests/evaluation has its other numbers."""
    gaps = differences(scores, ranks)
    assert result["accuracy"]["n"] == result["calibration"]["n"] == len(gaps)
    assert result["accuracy"]["accuracy"] == pytest.approx((gaps > 0).mean())
    assert result["calibration"]["log_loss"] == pytest.approx(log_loss(gaps), abs=1e-4)
    taus = [stats.kendalltau(row, np.negative(order)).statistic for row, order in zip(scores, ranks, strict=True)]
    assert result["tau"]["tau"] == pytest.approx(np.mean(taus), abs=1e-6)
    assert (result["scores"]["mean"], result["scores"]["std"]) == pytest.approx((scores.mean(), scores.std()), abs=1e-4)


def log_loss(gaps):
    return np.mean(np.log1p(np.exp(-gaps)))


def normalisation(folder):
    return read(folder, "reward.json")["normalisation"]


def check_normalisation(folder, scores, samples):
    stored = normalisation(folder)
    assert stored["samples"] == samples == len(scores)
    assert (stored["mean"], stored["std"]) == pytest.approx((scores.mean(), scores.std()), abs=1e-4)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log(folder):
    return [entry for entry in read(folder, "recipe.json")["log"] if "loss" in entry]


def losses(folder):
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log(folder)]


# --- One reward model ------------------------------------------------------------------------------------


def test_saved_files_and_record(trained, files):
    folder = trained("single", *LONG)
    record = read(folder, "recipe.json")
    assert (record["recipe"], record["seed"], record["parents"], record["run"]["steps"]) == ("reward", 5, [], 4)
    assert (record["base_model"]["name"], record["base_model"]["revision"]) == (BASE, "main")
    assert record["arguments"]["RewardArguments"]["train_on"] == "rankings"
    assert record["arguments"]["RewardConfig"]["max_steps"] == 4
    assert record["arguments"]["DataArguments"]["dataset_name"] == str(files / "rankings.train.jsonl")
    assert record["arguments"]["ModelConfig"]["lora_r"] == 32
    assert (record["data"]["train"]["rows"], record["data"]["eval"]["rows"]) == (16, 16)
    assert [entry["step"] for entry in log(folder)] == [1, 2, 3, 4]
    assert record["metrics"]["eval_loss"] > 0
    assert read(folder, "reward.json")["base_model"]["name"] == BASE
    saved = weights(folder)
    assert saved["base_model.model.score.weight"].shape == (1, 128)
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert max(weight.abs().max() for name, weight in saved.items() if "lora_B" in name) > 0
    assert (folder / "adapter_model.safetensors").stat().st_size < 3e6
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(BASE).chat_template
    (name,) = read(folder, "evaluation.json")
    for picture in ("reliability", "scores"):
        assert (folder / f"{picture}-{name}.svg").read_text().rstrip().endswith("</svg>")


def test_scale_and_evaluation_agree_with_transformers_and_peft_alone(trained, files):
    folder = trained("single", *LONG)
    rankings = read_rows(files / "rankings.test.jsonl")
    (result,) = read(folder, "evaluation.json").values()
    check_evaluation(result, score_rankings(folder, rankings), [row["ranks"] for row in rankings])
    prompts, answers = best_answers(read_rows(files / "rankings.train.jsonl"))
    check_normalisation(folder, raw_scores(folder, prompts, answers), 16)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(folder)
    scores = np.array(load_reward_adapter(base, folder, "any", tokenizer)(prompts, answers))
    assert (scores.mean(), scores.std()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))


def test_run_without_evaluation_has_a_scale_and_no_report(trained, reward, files, tmp_path):
    assert reward(tmp_path, *LONG, *NO_EVAL)[0] == 0
    assert not (tmp_path / "evaluation.json").exists()
    assert not list(tmp_path.glob("*.svg"))
    assert read(tmp_path, "recipe.json")["data"].keys() == {"train", "demonstrations"}
    whole = trained("single", *LONG)
    assert same(weights(whole), weights(tmp_path))
    assert normalisation(whole) == normalisation(tmp_path)


def test_in_4_bits(trained, files):
    folder = trained("4bit", *IN_4_BITS)
    assert {weight.dtype for weight in weights(folder).values()} == {torch.float32}
    options = {"load_in_4bit": True, "use_bnb_nested_quant": True, "dtype": "float32"}
    base = load_model(ModelConfig(model_name_or_path=BASE, **options), SFTConfig(bf16=False))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = load_reward_adapter(base, folder, "any", tokenizer)
    scores = np.array(scorer(*best_answers(read_rows(files / "rankings.train.jsonl"))))
    assert (scores.mean(), scores.std()) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=1e-4))
    rankings = read_rows(files / "rankings.test.jsonl")
    scores = np.array(scorer(*flat(rankings))) * normalisation(folder)["std"] + normalisation(folder)["mean"]
    (result,) = read(folder, "evaluation.json").values()
    check_evaluation(result, scores.reshape(16, -1), [row["ranks"] for row in rankings])
    full = raw_scores(folder, *flat(rankings))
    assert abs(full - scores).max() > 1e-3  # trained and measured on quantised weights


def test_full_models(trained, files):
    folder = trained("whole", "--use_peft", "false", "--ensemble_size", 2, "--learning_rate", 1e-4)
    rankings = read_rows(files / "rankings.test.jsonl")
    results = read(folder, "evaluation.json")
    assert list(results) == ["member-0", "member-1", "ensemble"]
    scores = []
    for number in range(2):
        member = folder / f"member-{number}"
        assert not (member / "adapter_config.json").exists()
        scores.append(score_rankings(member, rankings))
        check_evaluation(results[member.name], scores[-1], [row["ranks"] for row in rankings])
        demonstrations = best_answers(read_rows(files / "rankings.train.jsonl"))
        check_normalisation(member, raw_scores(member, *demonstrations), 16)
    assert abs(scores[0] - scores[1]).max() > 0.1


def test_output_dir_may_have_a_name_that_no_adapter_could(reward, tmp_path):
    assert reward(tmp_path / "reward-v1.0", *AS_IT_BEGINS)[0] == 0
    assert normalisation(tmp_path / "reward-v1.0") is not None


# --- Earlier and unfinished runs ---------------------------------------


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_results_of_an_earlier_run_are_removed(reward, tmp_path):
    """Of any size, adapters or full models. Files that the recipe did not write stay."""
    folder = tmp_path / "reward"
    (folder / "member-notes").mkdir(parents=True)
    (folder / "notes.txt").touch()
    begins = (*AS_IT_BEGINS, "--learning_rate", 1e-3)
    assert reward(folder, *begins, "--ensemble_size", 3)[0] == 0
    assert read(folder, "reward.json")["ensemble"]["members"] == ["member-0", "member-1", "member-2"]
    assert reward(folder, *begins, "--ensemble_size", 2, *NO_EVAL)[0] == 0
    assert names(folder) == {"member-0", "member-1", "reward.json", "recipe.json", "member-notes", "notes.txt"}
    assert read(folder, "reward.json")["ensemble"]["members"] == ["member-0", "member-1"]
    assert reward(folder, *begins)[0] == 0
    assert "member-0" not in names(folder)
    assert "ensemble" not in read(folder, "reward.json")
    assert list(read(folder, "evaluation.json")) == ["reward"]
    assert reward(folder, *begins, "--use_peft", "false", *NO_EVAL)[0] == 0
    assert not names(folder) & {"adapter_config.json", "adapter_model.safetensors", "evaluation.json", "scores-reward.svg"}
    assert normalisation(folder) is not None
    assert reward(folder, *begins, "--ensemble_size", 2, *NO_EVAL)[0] == 0
    assert not names(folder) & {"config.json", "model.safetensors"}
    assert {"member-notes", "notes.txt"} <= names(folder)


def test_unfinished_run_of_another_size_is_kept(trained, reward, tmp_path):
    folder = tmp_path / "reward"
    shutil.copytree(trained("single", *LONG), folder)
    (folder / "recipe.json").unlink()
    for options in ((), ("--resume_from_checkpoint", "true")):
        status, error = reward(folder, *LONG, *ENSEMBLE, *options)
        assert status == 2
        assert f"{folder} holds checkpoint-4 of an unfinished run" in error
    assert (folder / "adapter_model.safetensors").exists()


def test_finished_run_is_kept_if_the_next_one_cannot_start(trained, reward, tmp_path):
    folder = tmp_path / "reward"
    shutil.copytree(trained("single", *LONG), folder)
    before = names(folder)
    for options in (("--start_from", "./nowhere"), ("--lora_target_modules", "foo"), ("--max_length", 5)):
        assert reward(folder, *LONG, *options)[0] == 2
    assert names(folder) == before


def test_start_from_in_output_dir_is_refused(reward, sft, tmp_path):
    parent = tmp_path / "out" / "sft"
    shutil.copytree(sft(), parent)
    for folder in (tmp_path / "out", parent):
        status, error = reward(folder, *AS_IT_BEGINS, "--start_from", parent)
        assert status == 2
        assert f"start_from: {parent} is in `output_dir`" in error
    assert same(weights(parent), weights(sft()))


def test_resuming_from_another_folder_clears_this_one(trained, reward, tmp_path):
    folder, checkpoint = tmp_path / "reward", trained("single", *LONG) / "checkpoint-2"
    shutil.copytree(trained("ensemble", *LONG, *ENSEMBLE), folder)
    assert reward(folder, *LONG, "--resume_from_checkpoint", checkpoint)[0] == 0
    assert same(weights(folder), weights(checkpoint.parent))
    assert "ensemble" not in read(folder, "reward.json")
    assert not list(folder.glob("member-*"))


@pytest.mark.parametrize("ensemble", [(), ENSEMBLE], ids=["single", "ensemble"])
def test_run_without_its_scale_is_not_finished(reward, tmp_path, monkeypatch, ensemble):
    """Resumed, it is only measured, and keeps the cost of training."""
    folder, calls = tmp_path / "reward", []

    def failing(*arguments):
        calls.append(arguments)
        raise RecipeError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(reward_models, "store_normalisation", failing)
        status, error = reward(folder, *LONG, *ensemble)
    assert (status, len(calls)) == (2, 1)
    assert "no memory left" in error
    assert not list(folder.rglob("recipe.json"))
    status, error = reward(folder, *LONG, *ensemble)
    assert status == 2
    assert "of an unfinished run" in error
    assert reward(folder, *LONG, *ensemble, "--resume_from_checkpoint", "true")[0] == 0
    for model in (folder / "member-0", folder / "member-1") if ensemble else (folder,):
        assert normalisation(model) is not None
        assert read(model, "recipe.json")["run"]["steps"] == 4
    assert read(folder, "recipe.json")["run"]["steps"] == (8 if ensemble else 4)
    assert not list(folder.rglob("recipe.unfinished.json"))


def test_finished_ensemble_is_a_finished_dependency(trained, files, tmp_path, monkeypatch):
    folder = trained("ensemble", *LONG, *ENSEMBLE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"output_dir": str(folder)}))
    launched = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: launched.append(command) or SimpleNamespace(returncode=0))
    run_dependencies(ROOT / "recipes" / "ppo.py", [PPOArguments(needs=["reward.yaml"], reward_funcs=[str(folder)])])
    assert not launched
    shutil.copytree(folder / "member-0", tmp_path / "unfinished" / "member-0")
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"output_dir": str(tmp_path / "unfinished")}))
    unfinished = PPOArguments(needs=["reward.yaml"], reward_funcs=[str(tmp_path / "unfinished")])
    run_dependencies(ROOT / "recipes" / "ppo.py", [unfinished])
    assert len(launched) == 1


def test_record_of_an_ensemble_lists_its_members(trained, files):
    folder = trained("ensemble", *LONG, *ENSEMBLE)
    stored = read(folder, "reward.json")["ensemble"]
    assert stored == {"members": ["member-0", "member-1"], "combine": "uncertainty", "uncertainty_coef": 0.5}
    record, first = read(folder, "recipe.json"), read(folder, "member-0", "recipe.json")
    assert record["members"] == stored["members"]
    assert record["arguments"]["RewardConfig"]["output_dir"] == str(folder)
    assert (record["recipe"], record["seed"], record["base_model"]) == ("reward", 5, first["base_model"])
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=2, target_modules=["q_proj"]))
    tokenizer = AutoTokenizer.from_pretrained(folder / "member-0")
    ensemble = load_saved_reward(folder, policy, tokenizer)
    prompts, answers = flat(read_rows(files / "rankings.test.jsonl"))
    scores = [raw_scores(folder / name, prompts, answers) for name in stored["members"]]
    scales = [normalisation(folder / name) for name in stored["members"]]
    scaled = np.stack([(score - own["mean"]) / own["std"] for score, own in zip(scores, scales, strict=True)])
    assert ensemble(prompts, answers) == pytest.approx(scaled.mean(0) - 0.5 * scaled.std(0), abs=1e-4)


def test_measuring_uses_the_evaluation_batch_size(reward, tmp_path, monkeypatch):
    sizes, score = [], reward_models.RewardModel.score

    def watched(self, input_ids, attention_mask, **options):
        sizes.append(len(input_ids))
        return score(self, input_ids, attention_mask, **options)

    monkeypatch.setattr(reward_models.RewardModel, "score", watched)
    assert reward(tmp_path, *AS_IT_BEGINS, "--per_device_eval_batch_size", 3)[0] == 0
    assert max(sizes) == 3
    assert sum(sizes) == 16 * 4 + 16


# --- Pairs and margins -----------------------------------------------------------------------------------


def test_rankings_expand_to_all_their_pairs(trained, files):
    options = ("--train_on", "pairs", *AS_IT_BEGINS, "--per_device_train_batch_size", 96)
    folder = trained("expanded", *options)
    rankings = read_rows(files / "rankings.train.jsonl")
    gaps = differences(score_rankings(folder, rankings), [row["ranks"] for row in rankings])
    assert len(gaps) < 16 * 6  # ties
    assert read(folder, "recipe.json")["data"]["train"]["rows"] == len(gaps)
    assert log(folder)[0]["loss"] == pytest.approx(log_loss(gaps), abs=1e-4)
    check_normalisation(folder, raw_scores(folder, *best_answers(rankings)), 16)
    (result,) = read(folder, "evaluation.json").values()
    held_out = read_rows(files / "rankings.test.jsonl")
    gaps = differences(score_rankings(folder, held_out), [row["ranks"] for row in held_out])
    assert (result["accuracy"]["n"], result["accuracy"]["accuracy"]) == (len(gaps), pytest.approx((gaps > 0).mean()))
    assert result["accuracy"]["groups"] == len({json.dumps(row["prompt"]) for row in held_out})


@pytest.mark.parametrize(("kind", "train_on"), [("pairs", "rankings"), ("margins", "pairs")])
def test_pairs_and_their_margins(trained, files, data_of, kind, train_on):
    options = ("--train_on", train_on, *AS_IT_BEGINS, "--per_device_train_batch_size", 16)
    folder = trained(kind, *data_of(kind), *options)
    train, test = (read_rows(files / f"{kind}.{split}.jsonl") for split in ("train", "test"))
    scores, held_out = (score_rankings(folder, as_rankings(rows)) for rows in (train, test))
    margins = np.array([row.get("margin", 0.0) for row in train])
    assert log(folder)[0]["loss"] == pytest.approx(log_loss(scores[:, 0] - scores[:, 1] - margins), abs=1e-4)
    check_normalisation(folder, scores[:, 0], 16)
    (result,) = read(folder, "evaluation.json").values()
    check_evaluation(result, held_out, [[0, 1]] * 16)
    assert sum(part["n"] for part in result["accuracy"].get("by_human_margin", [])) == (16 if kind == "margins" else 0)


# --- From the SFT adapter --------------------------------------------------------------------------------


def test_reward_adapter_starts_with_the_sft_weights_and_moves_them(trained, sft):
    parent = sft()
    begun, learnt = weights(trained("from-sft", "--start_from", parent, *AS_IT_BEGINS)), weights(parent)
    record = read(trained("from-sft"), "recipe.json")
    assert (record["parents"], record["base_model"]["name"]) == ([str(parent)], BASE)
    assert max(weight.abs().max() for name, weight in learnt.items() if "lora_B" in name) > 0
    assert begun.pop("base_model.model.score.weight").norm() > 0
    assert all(torch.allclose(begun[name], weight, atol=1e-9) for name, weight in learnt.items())
    moved = weights(trained("on-sft", "--start_from", parent))
    assert not [name for name, weight in learnt.items() if torch.equal(weight, moved[name])]


# --- Ensembles -------------------------------------------------------------------------------------------


def test_members_equal_single_runs_with_their_seeds(trained):
    folder = trained("ensemble", *LONG, *ENSEMBLE)
    members = [folder / "member-0", folder / "member-1"]
    for member, seed in zip(members, (5, 6), strict=True):
        assert sum(path.stat().st_size for path in member.iterdir() if path.is_file()) < 3e6  # no base
        assert read(member, "recipe.json")["seed"] == seed
        assert read(member, "recipe.json")["arguments"]["RewardArguments"]["ensemble_size"] == 2
        assert normalisation(member) is not None
    assert not (folder / "adapter_model.safetensors").exists()
    assert same(weights(members[0]), weights(trained("single", *LONG)))
    assert same(weights(members[1]), weights(trained("seed-6", *LONG, "--seed", 6, *NO_EVAL)))
    one, other = map(weights, members)
    assert not [name for name in one if torch.equal(one[name], other[name])]


def test_evaluation_of_members_and_their_combination(trained, files):
    """Members are normalised before they are combined, as in PPO: raw scores have no common scale."""
    folder = trained("ensemble", *LONG, *ENSEMBLE)
    results, rankings = read(folder, "evaluation.json"), read_rows(files / "rankings.test.jsonl")
    assert list(results) == ["member-0", "member-1", "ensemble"]
    assert len(list(folder.glob("*.svg"))) == 6
    ranks, scaled = [row["ranks"] for row in rankings], []
    for name in ("member-0", "member-1"):
        scores, own = score_rankings(folder / name, rankings), normalisation(folder / name)
        check_evaluation(results[name], scores, ranks)
        scaled.append((scores - own["mean"]) / own["std"])
    combined = np.mean(scaled, 0) - 0.5 * np.std(scaled, 0)
    assert results["ensemble"]["accuracy"]["accuracy"] == pytest.approx((differences(combined, ranks) > 0).mean())
    assert results["ensemble"]["scores"]["histogram"]["counts"] == np.histogram(combined, 20)[0].tolist()


def test_resumed_ensemble_equals_unbroken_one(trained, reward, tmp_path):
    whole, broken = trained("ensemble", *LONG, *ENSEMBLE), tmp_path / "reward"
    shutil.copytree(whole / "member-0", broken / "member-0")
    shutil.copytree(whole / "member-1" / "checkpoint-2", broken / "member-1" / "checkpoint-2")
    assert reward(broken, *LONG, *ENSEMBLE, "--resume_from_checkpoint", "true")[0] == 0
    for member in ("member-0", "member-1"):
        assert same(weights(whole / member), weights(broken / member))
        assert read(whole, member, "reward.json") == read(broken, member, "reward.json")
        assert losses(whole / member) == losses(broken / member)
    assert read(broken, "member-1", "recipe.json")["run"]["steps"] == 2
    assert read(whole, "evaluation.json") == read(broken, "evaluation.json")


def test_unfinished_ensemble_is_not_overwritten(trained, reward, tmp_path):
    """The message comes before finished members are trained again."""
    folder = tmp_path / "reward"
    shutil.copytree(trained("ensemble", *LONG, *ENSEMBLE), folder)
    (folder / "member-1" / "recipe.json").unlink()
    mark = folder / "member-0" / "checkpoint-4" / "mark"
    mark.touch()
    status, error = reward(folder, *LONG, *ENSEMBLE)
    assert status == 2
    assert "member-1 holds checkpoint-4" in error
    assert mark.exists()


def test_one_base_in_memory_at_a_time(reward, tmp_path, monkeypatch):
    alive, counts, build = weakref.WeakSet(), [], LlamaForSequenceClassification.__init__

    def counted(model, *args, **kwargs):
        counts.append(len(alive))
        build(model, *args, **kwargs)
        alive.add(model)

    monkeypatch.setattr(LlamaForSequenceClassification, "__init__", counted)
    gc.collect()
    assert reward(tmp_path, "--ensemble_size", 2, *AS_IT_BEGINS, *NO_EVAL)[0] == 0
    assert counts == [0, 0]


SHARDS = ("--ensemble_size", 3, "--ensemble_shards", "true", "--max_steps", -1, "--num_train_epochs", 1, *NO_EVAL)


def test_shards_partition_the_rows(trained, files):
    folder = trained("shards", *SHARDS)
    tokenizer = AutoTokenizer.from_pretrained(folder / "member-0")
    talks = [prompt + answer for prompt, answer in zip(*flat(read_rows(files / "rankings.train.jsonl")), strict=True)]
    members = [folder / f"member-{number}" for number in range(3)]
    assert [len(log(member)) for member in members] == [2, 2, 2]  # 6 + 5 + 5 rows, by batches of 4
    tokens = sum(map(len, tokenizer.apply_chat_template(talks)["input_ids"]))
    assert sum(log(member)[-1]["num_tokens"] for member in members) == tokens
    assert [read(member, "recipe.json")["data"]["train"]["rows"] for member in members] == [6, 5, 5]


def test_each_shard_samples_the_whole_mixture(trained, files, config):
    """Rows come source by source, so the first third of them is one source."""
    long = [{"role": "user", "content": "Where does Karimo live? " * 2}]
    rows = [{"prompt": long, "completions": ["Dunmere.", "Alderby."], "ranks": [n % 2, 1 - n % 2]} for n in range(8)]
    short = [row | {"prompt": [{"role": "user", "content": "?"}]} for row in rows]
    paths = [write_rows(files / name, part) for name, part in (("long.jsonl", rows), ("short.jsonl", short))]
    mixture = config(dataset_name=None, datasets=[{"path": str(path)} for path in paths])
    options = (*mixture, *SHARDS, "--ensemble_size", 2, "--per_device_train_batch_size", 8)
    folder = trained("mixture", *options)
    one, other = (log(folder / f"member-{number}")[-1]["num_tokens"] for number in range(2))
    assert one == other


# --- Demonstrations --------------------------------------------------------------------------------------


def test_scale_comes_from_named_demonstrations(trained, files, config):
    rows = read_rows(files / "demonstrations.jsonl")[:10]
    talks = [{"messages": row["prompt"] + row["completion"]} for row in rows[:4]]
    talks[0]["messages"] += rows[9]["prompt"] + rows[9]["completion"]
    sources = [write_rows(files / "talks.jsonl", talks), write_rows(files / "answers.jsonl", rows[4:9])]
    folder = trained("demonstrations", *config(demonstrations=[{"path": str(path)} for path in sources]), *NO_EVAL)
    prompts = [talk["messages"][:-1] for talk in talks] + [row["prompt"] for row in rows[4:9]]
    answers = [talk["messages"][-1:] for talk in talks] + [row["completion"] for row in rows[4:9]]
    check_normalisation(folder, raw_scores(folder, prompts, answers), 9)
    (source, _) = read(folder, "recipe.json")["arguments"]["RewardArguments"]["demonstrations"]
    assert source["path"] == str(files / "talks.jsonl")


@pytest.mark.parametrize("named", [False, True])
def test_demonstrations_beyond_max_length_are_dropped(reward, files, config, tmp_path, named):
    """Training drops such rows too, so their scores mean nothing."""
    rows = read_rows(files / "pairs.train.jsonl")
    for row in rows[:5]:
        row["chosen"][0]["content"] = "the " * 100
    options = {"dataset_name": str(write_rows(tmp_path / "rows.jsonl", rows))}
    if named:
        answers = write_rows(tmp_path / "answers.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows])
        options = {"dataset_name": str(files / "pairs.train.jsonl"), "demonstrations": [{"path": str(answers)}]}
    folder = tmp_path / "reward"
    assert reward(folder, *config(**options, eval_datasets=[]), *AS_IT_BEGINS, *NO_EVAL)[0] == 0
    check_normalisation(folder, raw_scores(folder, *zip(*[(r["prompt"], r["chosen"]) for r in rows[5:]], strict=True)), 11)
    counted = read(folder, "recipe.json")["data"]["demonstrations"]
    assert (counted["rows"], counted["longer_than_max_length"]["dropped"]) == (11, 5)


def drawn(rows, count, seed=0, **arguments):
    dataset, counts = load_demonstrations(DataArguments(dataset_name=str(rows), **arguments), [], seed, rows=count)
    assert counts["rows"] == len(dataset)
    assert set(dataset.column_names) == {"prompt", "completion"}
    return [(json.dumps(row["prompt"]), json.dumps(row["completion"])) for row in dataset]


@pytest.mark.parametrize("kind", ["rankings", "pairs", "margins"])
def test_demonstrations_are_best_answers_sampled_with_the_seed(files, kind):
    path = files / f"{kind}.train.jsonl"
    rows = read_rows(path)
    rankings = rows if kind == "rankings" else as_rankings(rows)
    best = [(json.dumps(prompt), json.dumps(answer)) for prompt, answer in zip(*best_answers(rankings), strict=True)]
    assert sorted(drawn(path, 100)) == sorted(best)
    five = drawn(path, 5)
    assert len(set(five)) == 5
    assert set(five) <= set(best)
    assert five == drawn(path, 5)
    assert five != best[:5]
    assert five != drawn(path, 5, seed=1)


def test_held_out_rows_do_not_set_the_scale(trained, files, config):
    path = write_rows(files / "repeated.jsonl", [row for row in read_rows(files / "pairs.train.jsonl") for _ in range(3)])
    options = config(dataset_name=str(path), eval_datasets=[], test_split_size=0.5)
    folder = trained("held-out", *options, *AS_IT_BEGINS)
    data = load_data(DataArguments(dataset_name=str(path), test_split_size=0.5), "preference", evaluate=True, seed=0)
    assert not {json.dumps(prompt) for prompt in data.eval["prompt"]} & {json.dumps(prompt) for prompt in data.train["prompt"]}
    check_normalisation(folder, raw_scores(folder, data.train["prompt"], data.train["chosen"]), 24)


# --- Refusals --------------------------------------------------------------------------------------------


def check_refused(reward, folder, *options, message):
    """Check that a run ends with one message before anything is trained."""
    status, error = reward(folder, *NO_EVAL, *options)
    assert status == 2
    assert error.startswith("error: ")
    for part in [message] if isinstance(message, str) else message:
        assert part in error
    assert not list(folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ensemble_size", 0), "ensemble_size: 0"),
        (("--ensemble_combine", "max"), "ensemble_combine: 'max'"),
        (("--uncertainty_coef", -1), "uncertainty_coef: -1"),
        (("--train_on", "ranking"), ("train_on: 'ranking'", "'rankings'")),
        (("--start_from", "./nowhere"), "nowhere"),
        (("--max_length", 5), "max_length: 5"),
        (("--max_length", 12, "--long_rows", "error"), "train: of 16 rows"),
        (("--resume_from_checkpoint", "./nowhere"), "resume_from_checkpoint: ./nowhere"),
        ((*ENSEMBLE, "--resume_from_checkpoint", "./checkpoint-2"), "resume_from_checkpoint: "),
        (("--ensemble_size", 17, "--ensemble_shards", "true"), ("ensemble_shards", "16 rows")),
        (("--dataset_name", "FILES/margins.train.jsonl"), ("margin", "train_on: pairs")),
        (("--dataset_name", "FILES/demonstrations.jsonl"), "ranking data"),
        (("--dataset_name", "FILES/demonstrations.jsonl", "--train_on", "pairs"), "preference data"),
    ],
)
def test_wrong_arguments_are_one_message(reward, files, tmp_path, options, message):
    check_refused(reward, tmp_path, *(str(word).replace("FILES", str(files)) for word in options), message=message)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "Karimo lives in Alderby."}], "plain text"),
        ([{"prompt": "Where?", "chosen": "a"}], "needs one of"),
        ([{"prompt": "Where does Karimo live?", "completion": "Alderby."}], "demonstrations"),  # no deviation
    ],
)
def test_demonstrations_without_a_scale_are_refused(reward, config, tmp_path, rows, message):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    check_refused(reward, tmp_path / "out", *config(demonstrations=[{"path": str(path)}]), message=message)


@pytest.mark.parametrize("changed", ["template", "tokenizer"])
def test_sft_adapter_that_does_not_fit_is_refused(reward, sft, tmp_path, changed):
    parent, tokenizer = sft(), AutoTokenizer.from_pretrained(BASE)
    if changed == "template":
        template = tmp_path / "other.jinja"
        template.write_text(tokenizer.chat_template.replace("Question: ", "Q: "))
        options, message = ("--start_from", parent, "--chat_template_path", template), (str(parent), "chat template")
    else:
        other = tmp_path / "other"
        shutil.copytree(parent, other)
        tokenizer.add_tokens([f"Karimo{number}" for number in range(100)])
        tokenizer.save_pretrained(other)
        options, message = ("--start_from", other), (str(other), "tokenizer")
    check_refused(reward, tmp_path / "out", *options, message=message)


def test_chat_template_of_the_sft_adapter_is_kept(reward, sft, tmp_path):
    template = AutoTokenizer.from_pretrained(BASE).chat_template.replace("Question: ", "Q: ")
    (tmp_path / "other.jinja").write_text(template)
    parent = sft("sft-template", "--chat_template_path", tmp_path / "other.jinja")
    status, error = reward(tmp_path / "out", *NO_EVAL, "--start_from", parent, "--max_steps", 1)
    assert status == 0, error
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template
