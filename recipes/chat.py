"""Chat: talk to a base model and to adapters on it, one at a time or side by side.

    python recipes/chat.py                                    # configs/tiny/chat.yaml: the tiny world, on a CPU
    python recipes/chat.py --config my.yaml --temperature 0.7

`/policy ppo` changes who answers, `/both sft ppo` shows two answers side by side, `/score` shows rewards and KL of the last
answer, `/help` shows the rest. Lines may come through a pipe. Launch it with `python`: Ctrl-C would end `accelerate launch`.
"""

try:
    from rlhf_recipes.cli import check_early, exit_on_recipe_error
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}. Fix: run `source .venv/bin/activate` first") from None

if __name__ == "__main__":
    check_early(__file__)  # a misspelt key or path, before the seconds that the imports below take

from rlhf_recipes.chat import Chat
from rlhf_recipes.evaluation.named_rewards import load_named_rewards
from rlhf_recipes.feedback.sampling import reject_best_of
from rlhf_recipes.generation.policies import load_policy_bank, load_policy_tokenizer, read_policies, warn_of_plain_text
from rlhf_recipes.stages import parse_arguments

from accelerate import PartialState


def main() -> None:
    """Load the policies and rewards, and chat."""
    chat_args, model_args = parse_arguments(__file__)
    if not PartialState().is_main_process:
        return
    policies = read_policies(chat_args.policies)
    reject_best_of(policies)
    warn_of_plain_text(policies)

    # Every policy and every reward model is an adapter on one base
    tokenizer = load_policy_tokenizer(policies, model_args, chat_args)
    bank = load_policy_bank(model_args, chat_args, policies, tokenizer)
    rewards = load_named_rewards(chat_args.rewards, bank)

    Chat(bank, policies, rewards, chat_args).run()


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
