"""The table of voices."""

from __future__ import annotations

import pytest

from rwkvpeft.data.voices import Voice, VoiceTable
from rwkvpeft.errors import UserError


def test_a_voice_too_many_is_refused_and_does_not_stay_in_the_table():
    table = VoiceTable()
    voices = [Voice(float(number), is_answer=True) for number in range(1, 256)]
    assert [table.code(voice) for voice in voices] == list(range(1, 256))
    for _ in range(2):
        with pytest.raises(UserError, match="too many different"):
            table.code(Voice(0.5))
    assert len(table.voices) == 256
    assert [table.code(voice) for voice in voices] == list(range(1, 256))
