"""A second opinion on the loss: finds the assistant's turns by searching backwards for the text that starts them.

Labels never come from here. Searching breaks where a sample itself says what starts a turn; the labels, which come from
how the text was put together, do not. Where the two differ, one of them is wrong, and nothing should be trained.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from tasks.training.template import answer_marker


def turns_fault(
    processor: Any, ids: Sequence[int], covered: Sequence[bool], *, texts: Sequence[str], stop_ids: tuple[int, ...]
) -> str | None:
    """Say how `covered`, the tokens of one row that are in the loss, differ from its assistant's turns; None if not.

    `texts` is what the sample says itself. A sample that says what starts a turn is at fault if that is a control
    token, and not judged if it is plain text.
    """
    marker = answer_marker(processor)
    if any(_squeezed(marker) in _squeezed(text) for text in texts):
        control = [token for token in processor.tokenizer.get_added_vocab() if token in marker]
        return f"the sample's own text says {control[0]!r}, which starts or ends turns" if control else None
    pieces = [_squeezed(processor.tokenizer.decode([token], skip_special_tokens=False)) for token in ids]
    turns = find_turns(ids, pieces, marker=marker, stop_ids=stop_ids)
    said = {at for turn in turns for at in turn}
    learned = {at for at, inside in enumerate(covered) if inside}
    wrong = sorted((said ^ learned) - {at for turn in turns for at in _leading_blanks(turn, pieces)})
    if not wrong:
        return None
    what = "misses" if wrong[0] in said else "covers"
    return f"the loss {what} token {wrong[0]} ({pieces[wrong[0]]!r}), judging by what follows {marker!r}"


def find_turns(ids: Sequence[int], pieces: Sequence[str], *, marker: str, stop_ids: tuple[int, ...]) -> list[range]:
    """Return the positions of each turn, last turn first: what follows `marker`, to the first stop token with it.

    `pieces` are the tokens' texts without blanks. A turn that never stops ends where the next one's marker starts.
    """
    ends = list(accumulate(len(piece) for piece in pieces))
    starts = [end - len(piece) for end, piece in zip(ends, pieces, strict=True)]
    text, sought = "".join(pieces), _squeezed(marker)
    turns, limit, end = [], len(ids), len(text)
    while (found := text.rfind(sought, 0, end)) >= 0:
        first = bisect_left(starts, found + len(sought))
        stop = next((at for at in range(first, limit) if ids[at] in stop_ids), limit - 1)
        turns.append(range(first, stop + 1))
        limit, end = bisect_left(starts, found), found
    return turns


def _leading_blanks(turn: range, pieces: Sequence[str]) -> range:
    """Blank tokens at the start of a turn: the end of its marker, or the start of what is said."""
    return range(turn.start, next((at for at in turn if pieces[at]), turn.stop))


def _squeezed(text: str) -> str:
    return "".join(text.split())
