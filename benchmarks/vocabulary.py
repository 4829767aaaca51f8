"""A tokenizer with as many entries as a benchmark's head has rows.

gspo's distributions are over the tokenizer's entries only. With the embedded models' tokenizer of a
hundred characters a head of 151,936 rows would be one of a hundred, and no peer would do the same.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gspo.policy.embedded import SPECIAL, build_tokenizer


def full_tokenizer(entries: int) -> PreTrainedTokenizerBase:
    """The embedded models' tokenizer, with words that no text holds up to `entries`.

    >>> large, small = full_tokenizer(1000), build_tokenizer()
    >>> len(large), large("12").input_ids == small("12").input_ids
    (1000, True)
    """
    tokenizer = build_tokenizer()
    fast: Any = tokenizer
    raw = json.loads(fast.backend_tokenizer.to_str())
    words = raw["model"]["vocab"]
    words |= {f"<|word {i}|>": i for i in range(len(words), entries)}
    return type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)),
        chat_template=tokenizer.chat_template,
        additional_special_tokens=list(SPECIAL[2:5]),
        **tokenizer.special_tokens_map,
    )
