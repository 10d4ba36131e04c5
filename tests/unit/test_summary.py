"""What the summary of a finished search has of what its settings ask for now."""

import pytest

from hiertune._summary import DECODE_OFF, beyond, missing_in
from hiertune.config import SearchSection

RULE = {"rule": None, "name": "as trained", "tried": 0, "reason": "the validation logits are not kept: 1 GiB"}


def summary(controls, refit, decode):
    return {
        "controls": {"flat": {}} if controls else {},
        "refit": refit,
        "winner": {"decoding": RULE if decode else {"rule": None, "reason": DECODE_OFF}},
    }


@pytest.mark.parametrize("controls", [False, True])
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("decode", [False, True])
def test_what_is_on_is_missing_and_what_is_off_is_beyond(controls, refit, decode):
    settings = {"controls": controls, "refit": refit, "decode": decode}
    asked = SearchSection(**settings)
    on = [name for name, value in settings.items() if value]
    assert missing_in(summary(**settings), asked) == beyond(summary(**settings), asked) == []
    # Another winner is trained with refit, or without: there is nothing to be shown of it.
    nothing, everything = summary(False, False, False), summary(True, True, True)
    assert missing_in(nothing, asked) == on
    assert beyond(nothing, asked) == []
    assert missing_in(everything, asked) == ([] if refit else ["refit"])
    assert beyond(everything, asked) == [name for name in ("controls", "decode") if name not in on]


def test_a_summary_from_before_there_were_rules_has_none():
    older = {"controls": {"flat": {}}, "refit": True, "winner": {}}
    assert missing_in(older, SearchSection()) == ["decode"]
    assert beyond(older, SearchSection(decode=False)) == []
