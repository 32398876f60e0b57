"""What reading a hostile file may take."""

import resource
import time

import pytest

ROOM_MIB = 300


@pytest.fixture
def bounded():
    """No test that asks for this may take five seconds of a processor, or much memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < ROOM_MIB << 10
