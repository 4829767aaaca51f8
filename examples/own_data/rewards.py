"""Two reward functions: TRL's shape, and the simple one."""


def exact(completions, answer, **columns):
    """1 for the right answer: all completions of a prompt, and the column `answer` as a list."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def begun(completion, row):
    """The share of the answer that is right before the first mistake."""
    right = row["answer"]
    places = (n for n, digit in enumerate(right) if completion[n : n + 1] != digit)
    return next(places, len(right)) / len(right)
