"""Which tokens to train: from what a study file names to ids of the vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from workbench.errors import DataError

from .data import IGNORED, Split


class TokenChoice(Protocol):
    """Tokens as a study file names them; what is not used is empty or None."""

    @property
    def ids(self) -> Sequence[int] | None: ...
    @property
    def strings(self) -> Sequence[str] | None: ...
    @property
    def new_tokens(self) -> Sequence[str] | None: ...
    @property
    def most_frequent(self) -> int | None: ...
    @property
    def most_informative(self) -> int | None: ...


def resolve(tokens: TokenChoice, tokenizer: PreTrainedTokenizerBase, split: Split) -> list[int]:
    """The ids of the chosen tokens.

    Args:
        tokens: the choice.
        tokenizer: knows the new tokens already (`Base.vocabulary`).
        split: the training split, tokenised by the same tokenizer; frequency and information are counted in it.

    Raises:
        DataError: an id is out of range or chosen twice, a string is not exactly one token, or tokens are too few.
    """
    special = tokenizer.all_special_ids
    ids = [
        *(tokens.ids or ()),
        *(one_token(string, tokenizer) for string in tokens.strings or ()),
        *(tokenizer.convert_tokens_to_ids(token) for token in tokens.new_tokens or ()),
        *(most_frequent(split, tokens.most_frequent, special) if tokens.most_frequent else ()),
        *(most_informative(split, tokens.most_informative, special) if tokens.most_informative else ()),
    ]
    outside = [i for i in ids if not 0 <= i < len(tokenizer)]
    if outside:
        raise DataError(f"Token ids {outside[:5]} are outside the vocabulary, which has {len(tokenizer)} tokens.")
    doubled = [tokenizer.convert_ids_to_tokens(i) for i in dict.fromkeys(ids) if ids.count(i) > 1]
    if doubled:
        raise DataError(f"Tokens are chosen twice: {', '.join(map(repr, doubled[:5]))}.")
    return ids


def one_token(string: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a string that is in the vocabulary as it stands, or becomes exactly one token.

    Raises:
        DataError: it becomes several tokens, or an unknown one.
    """
    vocabulary = tokenizer.get_vocab()
    if string in vocabulary:
        return vocabulary[string]
    pieces = tokenizer(string, add_special_tokens=False)["input_ids"]
    if len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id:
        return pieces[0]
    names = " ".join(tokenizer.convert_ids_to_tokens(pieces)) or "nothing"
    raise DataError(f"{string!r} is not one token but {names}. To train it as one, write {{new_tokens: [{string!r}]}}.")


def most_frequent(split: Split, k: int, exclude: Collection[int] = ()) -> list[int]:
    """The `k` tokens that occur most often; of equals, those with the lower id.

    Raises:
        DataError: the split has fewer different tokens.
    """
    counts = np.bincount(np.fromiter(chain.from_iterable(split.features["input_ids"]), np.int64))
    return top(counts, k, exclude, candidates=counts > 0)


def most_informative(split: Split, k: int, exclude: Collection[int] = ()) -> list[int]:
    """The `k` tokens whose presence tells most about the label: mutual information with the class of the row (SEQ_CLS)
    or with the tag of the position (TOKEN_CLS); of equals, those with the lower id.

    Raises:
        DataError: the task has no labels, or the split has fewer different tokens.
    """
    rows = zip(split.features["input_ids"], split.features["labels"], strict=True)
    if split.task == "SEQ_CLS":
        seen = [(set(ids), label) for ids, label in rows]
    elif split.task == "TOKEN_CLS":
        seen = [({token}, tag) for ids, tags in rows for token, tag in zip(ids, tags, strict=True) if tag != IGNORED]
    else:
        raise DataError(f"most_informative needs labels, which {split.task} has not; use most_frequent.")
    by_label = np.bincount([label for _, label in seen])
    together = np.zeros((1 + max(max(tokens) for tokens, _ in seen), len(by_label)))
    for tokens, label in seen:
        together[list(tokens), label] += 1
    return top(mutual_information(together, by_label), k, exclude, candidates=together.sum(1) > 0)


def mutual_information(together: np.ndarray, by_label: np.ndarray) -> np.ndarray:
    """Information (nats) that each token's presence gives about the label, from counts.

    Args:
        together: `(tokens, labels)`: how often the token was there and the label was this one.
        by_label: `(labels,)`: how often the label was this one.
    """
    total = by_label.sum()
    information = np.zeros(len(together))
    for joint in (together, by_label - together):  # the token is there, or it is not
        expected = joint.sum(1, keepdims=True) * by_label / total
        ratio = np.divide(joint, expected, out=np.ones_like(joint), where=joint > 0)
        information += (joint / total * np.log(ratio)).sum(1)
    return information


def top(scores: np.ndarray, k: int, exclude: Collection[int], candidates: np.ndarray) -> list[int]:
    """Ids of the `k` highest scores among the candidates, highest first."""
    candidates[[i for i in exclude if i < len(candidates)]] = False
    if k > candidates.sum():
        raise DataError(f"{k} tokens are asked for, but the training split has only {candidates.sum()} different ones.")
    # rounded, so that equal information is equal on every machine, whatever the order of its sums
    order = np.lexsort((np.arange(len(scores)), -np.round(scores, 12)))
    return [int(i) for i in order if candidates[i]][:k]
