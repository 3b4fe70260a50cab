"""Evaluation of any number of policies on held-out prompts, with a report.

    accelerate launch recipes/evaluate.py                     # configs/tiny/evaluate.yaml: the tiny world, on a CPU
    accelerate launch recipes/evaluate.py --config my.yaml --num_answers 4

Writes `metrics.json`, all answers in `answers.jsonl`, and `index.html`, which needs no other file: a verdict in plain words
with a picture, what was trained on what, answers side by side, and all numbers. Prints the verdict. Runs in one process.
"""

from pathlib import Path

from rlhf_recipes.cli import check_early, exit_on_recipe_error

if __name__ == "__main__":
    check_early(__file__)  # a misspelt key or path, before the seconds that the imports below take

from rlhf_recipes.core.files import check_writable
from rlhf_recipes.data import check_positions, check_rendered, drop_overlong_mode, load_texts
from rlhf_recipes.evaluation.collect import collect_results, write_answers
from rlhf_recipes.evaluation.frontier import measure_frontier
from rlhf_recipes.evaluation.measurement import Measurement, check_choosers, check_names, choose_judge, sample_policy
from rlhf_recipes.evaluation.named_rewards import load_named_rewards
from rlhf_recipes.evaluation.policy_checks import add_recorded_training, check_policies
from rlhf_recipes.evaluation.prompts import held_out_prompts
from rlhf_recipes.evaluation.report.html import write_report
from rlhf_recipes.generation.policies import load_policy_bank, load_policy_tokenizer, read_policies
from rlhf_recipes.models.positions import position_limit
from rlhf_recipes.stages import parse_arguments

from accelerate import PartialState


def main() -> None:
    """Measure the policies and write the report."""
    evaluate_args, data_args, model_args = parse_arguments(__file__)
    if not PartialState().is_main_process:
        return
    check_writable(Path(evaluate_args.output_dir))
    policies = read_policies(evaluate_args.policies)
    check_names(evaluate_args, policies)
    same = check_policies(policies, evaluate_args)

    # Data: prompts that no stage was trained on
    rows = held_out_prompts(data_args, evaluate_args)
    tokenizer = load_policy_tokenizer(policies, model_args, evaluate_args)
    rows, _ = check_rendered(
        rows, "prompt", tokenizer, evaluate_args.max_prompt_length, drop_overlong_mode(data_args.long_rows), "eval"
    )
    limit = position_limit(model_args)
    lengths = evaluate_args.max_prompt_length, "eval", limit, evaluate_args.max_completion_length
    check_positions(rows, "prompt", tokenizer, *lengths)
    texts = load_texts(evaluate_args.ptx_dataset, data_args.bad_rows, tokenizer) if evaluate_args.ptx_dataset else None
    if texts is not None:
        check_positions(texts, "sft", tokenizer, evaluate_args.ptx_max_length, "ptx_dataset", limit, key="ptx_max_length")
    print(f"{len(rows)} prompts, {len(policies)} policies: {', '.join(policies)}", flush=True)

    # Roles: every policy and every reward model as an adapter on one base
    bank = load_policy_bank(model_args, evaluate_args, policies, tokenizer)
    rewards = load_named_rewards(evaluate_args.rewards, bank, evaluate_args.batch_size, rows)
    rewards = add_recorded_training(rewards, policies)
    judge = choose_judge(evaluate_args, rewards)
    measurement = Measurement(bank, rows, rewards, evaluate_args)
    check_choosers(policies, measurement)

    # Answers of every policy, each with a seed of its own, and their metrics
    samples = {}
    for number, (name, policy) in enumerate(policies.items()):
        samples[name] = sample_policy(measurement, policy, evaluate_args.seed + number)
        print(f"{name} has answered", flush=True)
    frontier = measure_frontier(measurement, evaluate_args.seed + len(policies))
    results = collect_results(measurement, policies, samples, judge, frontier, texts, same)

    write_answers(evaluate_args.output_dir, measurement, samples)
    page = write_report(evaluate_args.output_dir, results)
    print(*results.verdict, f"The report is {page}", sep="\n")


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
