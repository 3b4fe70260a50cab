"""The figures of docs/tiny.md, for one seed: what supervised fine-tuning does to a model that knows whom it knows."""

from rlhf_recipes.tiny.examine import examine, load_policy

import pytest


@pytest.mark.parametrize("abstain", [0.0, 0.25])
def test_sft_cannot_teach_whom_to_abstain_on(launch, tmp_path, abstain):
    arguments = f'{{"rows": 25600, "abstain": {abstain}}}'
    options = ("--eval_strategy", "no", "--save_strategy", "no", "--output_dir", tmp_path)
    assert launch("sft", "--dataset_arguments", arguments, *options)[0] == 0
    result = examine(*load_policy(tmp_path))
    if not abstain:
        assert result.unknown["made_up"] >= 0.85
        assert result.known["right"] >= 0.85
        return
    assert abs(result.known["abstained"] - result.unknown["abstained"]) <= 0.10
    assert 0.15 <= result.unknown["abstained"] <= 0.35
    assert result.unknown["made_up"] >= 0.60
