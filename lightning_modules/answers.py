"""When an answer is right: said once, for metrics, predictions, the sample page and the demo."""


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer is the reference word for word; only white space around the two makes no difference.

    `exact_match` says the same without generating: whether greedy decoding would give the tokens of the reference.
    """
    return answer.strip() == reference.strip()
