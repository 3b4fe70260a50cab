"""Sampling of groups: different completions, several policies, and resuming."""

import errno
import json
import os
import sys
from collections import Counter
from unittest.mock import ANY

from rlhf_recipes.config.sample import SampleArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback import sampling
from rlhf_recipes.feedback.groups import GroupRow
from rlhf_recipes.feedback.ranking import read_labeler
from rlhf_recipes.feedback.sampling import GroupFile, sample_groups
from rlhf_recipes.generation.policies import Policy, load_policy_bank
from rlhf_recipes.tiny import splits

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

BASE = "rlhf_recipes.tiny.base"


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """The tiny base, and an adapter that changes its answers."""
    from rlhf_recipes.core.hub import resolve_path

    folder = tmp_path_factory.mktemp("adapter")
    base, tokenizer = (cls.from_pretrained(resolve_path(BASE)) for cls in (AutoModelForCausalLM, AutoTokenizer))
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    policies = {"base": Policy("base"), "other": Policy("other", str(folder))}
    return load_policy_bank(ModelConfig(BASE, dtype="float32"), SampleArguments(), policies, tokenizer)


def arguments(**options):
    return SampleArguments(**{"max_completion_length": 12, "batch_size": 8, "temperature": 2.0} | options)


def all_groups(bank, policies, rows, options, done=0):
    return [group for part, _ in sample_groups(bank, policies, rows, options, done) for group in part]


def texts(group):
    return [message["content"] for (message,) in group["completions"]]


def test_completions_of_a_prompt_differ_and_columns_are_kept(bank):
    rows = splits.prompts(rows=6)
    groups = all_groups(bank, ["base"], rows, arguments(num_completions=3, temperature=4.0))
    assert [group["prompt"] for group in groups] == rows["prompt"]
    assert [group["reference"] for group in groups] == rows["reference"]
    for group in groups:
        assert len({text.strip() for text in texts(group)}) == 3
        assert group["sources"] == ["base"] * 3


def test_several_policies_write_equally_many(bank):
    groups = all_groups(bank, ["base", "other"], splits.prompts(rows=8), arguments(num_completions=3, temperature=4.0))
    counts = Counter(source for group in groups for source in group["sources"])
    assert counts == {"base": 12, "other": 12}
    assert {tuple(sorted(Counter(group["sources"]).values())) for group in groups} == {(1, 2)}


def test_plain_prompts_have_plain_completions(bank):
    (group,) = all_groups(bank, ["base"], Dataset.from_dict({"prompt": ["Zaza lives in"]}), arguments(num_completions=2))
    assert all(isinstance(text, str) for text in group["completions"])


@pytest.mark.parametrize("own", [" Guess: ", " [ ] To: "])
def test_what_the_template_writes_is_no_part_of_an_answer(bank, monkeypatch, own):
    """As Qwen3's empty thought. Answers that differ in it alone are one answer."""
    tokenizer, answers = bank.tokenizer, [f"{own}Mossgate.", " Mossgate.", f"{own}Rome.", f" Rome,{own}Rome."]
    template = tokenizer.chat_template.replace("' ' + message['content']", f"'{own}' + message['content']")
    monkeypatch.setattr(tokenizer, "chat_template", template)

    def generate(input_ids, **_):
        written = [[*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for answer in answers]
        return torch.cat([input_ids, tokenizer.pad({"input_ids": written}, return_tensors="pt")["input_ids"]], dim=1)

    monkeypatch.setattr(bank.model, "generate", generate)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Where?"}], "reference": "Mossgate."}])
    (row,) = all_groups(bank, ["base"], rows, arguments(num_completions=4, max_attempts=1))
    assert {text.strip() for text in texts(row)} == {"Mossgate.", "Rome.", f"Rome,{own}Rome."}
    group = GroupRow.model_validate(row).group()
    (ranking,) = read_labeler({"path": "rlhf_recipes.rewards.normalised_match"}, 0)([group])
    assert ranking["ranks"] == [1 if text == "Mossgate." else 2 for text in group.texts()]


def test_a_prompt_that_ends_with_an_answer_is_refused_before_sampling(bank):
    prompt = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In"}]
    rows = Dataset.from_dict({"prompt": [prompt[:1], prompt]})
    with pytest.raises(RecipeError, match=r"ends with the assistant's turn: .*Where"):
        next(sample_groups(bank, ["base"], rows, arguments()))


def test_missing_completions_are_sampled_again(bank):
    rows, options = splits.prompts(rows=16), {"num_completions": 4, "temperature": 1.0}
    once, often = (
        [len(group["completions"]) for group in all_groups(bank, ["base"], rows, arguments(max_attempts=attempts, **options))]
        for attempts in (1, 6)
    )
    assert sum(once) < sum(often)
    assert max(often) == 4


def test_a_prompt_with_one_completion_is_left_out_and_counted(tmp_path):
    file = GroupFile(tmp_path, {})
    file.append([{"prompt": "a", "completions": ["x", "y"]}, {"prompt": "b", "completions": ["x"]}])
    assert (file.prompts, file.groups) == (2, 1)
    assert [json.loads(line)["prompt"] for line in file.path.read_text().splitlines()] == ["a"]


def test_samples_of_another_run_are_not_appended_to(tmp_path):
    data, adapter = tmp_path / "prompts.jsonl", tmp_path / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir()
    arguments = {"dataset_name": str(data), "policies": {"sft": str(adapter.parent)}, "temperature": 1.0}
    for path in (data, adapter):
        path.write_text("one")
    folder = tmp_path / "out"
    assert GroupFile(folder, arguments).prompts == GroupFile(folder, arguments).prompts == 0
    with pytest.raises(RecipeError, match=r"output_dir: .*temperature: 1.0 then, 0.5 now"):
        GroupFile(folder, arguments | {"temperature": 0.5})
    for path in (data, adapter):
        path.write_text("another")
        with pytest.raises(RecipeError, match=f"output_dir: .*{path.name}: .* then"):
            GroupFile(folder, arguments)
        folder = tmp_path / path.stem
        GroupFile(folder, arguments)


def test_other_files_are_not_overwritten(tmp_path):
    path = tmp_path / "groups.jsonl"
    path.write_text("precious\n")
    with pytest.raises(RecipeError, match=f"output_dir: {path}: was not written by this recipe"):
        GroupFile(tmp_path, {})
    assert path.read_text() == "precious\n"


@pytest.mark.parametrize("left", [None, b"", b'{"prompt": "a"'])
def test_lost_samples_are_an_error(tmp_path, left):
    file = GroupFile(tmp_path, {})
    file.append([{"prompt": "a", "completions": ["x", "y"]}])
    file.path.unlink()
    if left is not None:
        file.path.write_bytes(left)
    with pytest.raises(RecipeError, match=rf"output_dir: {file.path}: \d+ of \d+ bytes are missing"):
        GroupFile(tmp_path, {})
    assert (file.path.read_bytes() if left is not None else None) == left


def test_a_damaged_state_is_one_message(tmp_path):
    GroupFile(tmp_path, {})
    (tmp_path / "sample.json").write_text('{"arguments": 3}')
    with pytest.raises(RecipeError, match=r"output_dir: .*sample.json: is damaged"):
        GroupFile(tmp_path, {})


def test_a_full_disk_keeps_earlier_parts(tmp_path, monkeypatch):
    file = GroupFile(tmp_path, {})
    part = [{"prompt": "a", "completions": ["x", "y"]}]
    file.append(part)
    before = file.path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        file.append(part)
    again = GroupFile(tmp_path, {})
    assert (again.path.read_bytes(), again.groups) == (before, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policies", "{}"), "policies: "),
        (("--policies", '{"a": null, "b": {"best_of": {"policy": "a", "n": 2}}}'), "policies: b: cannot sample from best-of-n"),
        (("--policies", '{"a": null}', "--num_completions", "1"), "num_completions: 1"),
        (("--policies", '{"a": null}', "--num_completions", "65"), "num_completions: 65"),  # no file of groups holds them
        (("--policies", '{"a": null}', "--temperature", "0"), "temperature: 0.0"),
    ],
)
def test_a_mistake_of_the_user_is_one_message(launch, tmp_path, options, message):
    status, error = launch("sample", *options, "--output_dir", tmp_path / "out")
    assert status == 2
    assert message in error


def test_an_interrupted_recipe_resumes_to_the_same_file(launch, tmp_path, monkeypatch):
    parts, sample_part = [], sampling._sample_part
    monkeypatch.setattr(sampling, "_sample_part", lambda *args: parts.append(args[-1]) or sample_part(*args))
    options = ("--policies", '{"base": null}', "--dataset_arguments", '{"rows": 6}', "--temperature", 3, "--batch_size", 8)
    complete, resumed = tmp_path / "complete", tmp_path / "resumed"
    assert launch("sample", *options, "--output_dir", complete) == (0, ANY)
    groups = [json.loads(line) for line in (complete / "groups.jsonl").read_text().splitlines()]
    assert all(len(group["completions"]) == 4 for group in groups)
    assert (len(groups), parts) == (6, [0, 2, 4])

    append = GroupFile.append
    monkeypatch.setattr(GroupFile, "append", lambda file, *part: append(file, *part) if not file.prompts else sys.exit(9))
    assert launch("sample", *options, "--output_dir", resumed)[0] == 9
    monkeypatch.setattr(GroupFile, "append", append)
    with (resumed / "groups.jsonl").open("a") as file:
        file.write('{"prompt": [{"role": "us')  # killed in the middle of a line
    for expected in ([2, 4], []):  # complete parts are not sampled again
        parts.clear()
        assert launch("sample", *options, "--output_dir", resumed) == (0, ANY)
        assert parts == expected
    assert (resumed / "groups.jsonl").read_bytes() == (complete / "groups.jsonl").read_bytes()


@pytest.mark.parametrize(("groups", "warns"), [(1, True), (2, False)])
def test_few_prompts_with_different_completions(tmp_path, caplog, groups, warns):
    file = GroupFile(tmp_path, {})
    different, alike = {"prompt": "a", "completions": ["x", "y"]}, {"prompt": "b", "completions": ["x"]}
    file.append([different] * groups + [alike] * (20 - groups))
    assert file.summary().startswith(f"{groups} groups are in {file.path}")
    assert ("temperature: only 1 of 20 prompts" in caplog.text) == warns


def test_no_prompt_with_different_completions(tmp_path):
    file = GroupFile(tmp_path, {})
    file.append([{"prompt": "b", "completions": ["x"]}])
    with pytest.raises(RecipeError, match=r"temperature: the completions of each of 1 prompts are alike"):
        file.summary()
