"""Pairs for a scalar head: one read-out per answer, at its last token.

A pack tells a model by its targets which rows are read: the row before each target. A scalar head is read *after* the
last token, so an answer gets one more token whose only use is to be that target. As the last token of a sequence it is
no row of the pack: the network never reads it, and every real token is a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tulu_hpc.data.packed_batch import Item, TokenSequence


def with_readout(item: Item) -> Item:
    """The item with exactly one target per response: the place after its last token.

    `preference_items` ends a response with its last trained token, the end-of-text of the last assistant turn unless
    the answer was cut; that is where the score is read [2411.15124, appendix].
    """
    return replace(item, responses=[_with_readout(response) for response in item.responses], per_target={})


def _with_readout(response: TokenSequence) -> TokenSequence:
    tokens = torch.cat((response.tokens, response.tokens[-1:]))  # any token will do
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    mask[-1] = True
    return TokenSequence(tokens, mask)
