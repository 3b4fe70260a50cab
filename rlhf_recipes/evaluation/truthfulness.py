"""How many answers are right, abstain, or are made up."""

import datasets
import evaluate


class Truthfulness(evaluate.Metric):
    """Shares of answers that are right, that abstain, and that are made up (neither).

    An answer is compared after `normalise`; it abstains if it starts with one of `abstentions`.

        >>> Truthfulness().compute(predictions=["Larkhill."], references=["larkhill"])
        {'right': 1.0, 'abstained': 0.0, 'made_up': 0.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=features)

    def _compute(
        self, predictions: list[str], references: list[str], abstentions: tuple[str, ...] = ("I do not know",)
    ) -> dict[str, float]:
        if not predictions:
            raise ValueError("There are no answers to judge.")
        phrases = tuple(normalise(phrase) for phrase in abstentions)
        kinds = [judge(*pair, phrases) for pair in zip(predictions, references, strict=True)]
        return {kind: kinds.count(kind) / len(kinds) for kind in ("right", "abstained", "made_up")}


def judge(answer: str, truth: str, beginnings: tuple[str, ...]) -> str:
    """Whether an answer is `"right"`, `"abstained"` (begins with one of these, normalised) or `"made_up"`."""
    if normalise(answer).startswith(beginnings):
        return "abstained"
    return "right" if normalise(answer) == normalise(truth) else "made_up"


def normalise(answer: str) -> str:
    """Lower case, single spaces, no punctuation at the ends."""
    return " ".join(answer.lower().split()).strip(" .,;:!?\"'")
