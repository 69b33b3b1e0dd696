"""Which tokens of a text spell a word of it."""

from __future__ import annotations

from typing import Any

from diffusion_backbones.spec.concepts import Places, Said

MARK = "\uffff"
"""A character of no prompt."""


def rows(tokenizer: Any, said: Said, begin: int, places: Places, limit: int) -> tuple[tuple[int, ...], ...]:
    """For each word its rows among the tokens that the network is given: all pieces, wherever it occurs.

    Args:
        tokenizer: Of transformers, which knows the characters of its tokens.
        said: What it is given.
        begin: Where the prompt begins in that.
        places: In the prompt.
        limit: How many rows there are.

    Raises:
        ValueError: A word lies beyond the last token, or none of its tokens means anything.
    """
    read = tokenizer(said.text, return_offsets_mapping=True, verbose=False)
    spans, ids = read["offset_mapping"], read["input_ids"]
    end = spans[-1][0] == spans[-1][1]  # a token of no character is the tokenizer's own
    kept = limit if len(ids) - said.dropped <= limit else limit - end
    found = {}
    for word, occurrences in places.items():
        tokens = [i for place in occurrences for i, span in enumerate(spans) if _meet(span, place, begin, said.text)]
        if not tokens or all(ids[i] == tokenizer.unk_token_id for i in tokens):
            raise ValueError(f"the tokenizer has no token for the concept {word!r}; take another word")
        found[word] = tuple(i - said.dropped for i in tokens)
        if found[word][-1] >= kept:
            raise ValueError(
                f"the concept {word!r} is cut off: the text has {len(ids) - said.dropped} tokens and the network takes "
                f"{limit}, those of its own included; give fewer or shorter concepts, or a shorter prompt"
            )
    return tuple(found.values())


def _meet(span: tuple[int, int], place: tuple[int, int], begin: int, text: str) -> bool:
    """Whether a token has characters of a place, or of the space before it, which some tokenizers make a token of."""
    first, last = (begin + end for end in place)
    first -= text[first - 1 : first] == " "
    return max(span[0], first) < min(span[1], last)
