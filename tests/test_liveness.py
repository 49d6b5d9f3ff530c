"""Claims about what ranks tell each other of themselves: hearts of two ranks around one store, with a quick beat."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import DistBackendError, HashStore

from alignscale import liveness
from alignscale.liveness import Heart, RankError

Made = Callable[..., Heart]
BEAT = 0.15


@pytest.fixture
def ended() -> list[RankError]:
    """How hearts have ended their process."""
    return []


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, ended: list[RankError]) -> Iterator[Made]:
    """Makes the heart of a rank of two."""
    monkeypatch.setattr(liveness, "BEAT", BEAT)
    monkeypatch.setattr(Heart, "end", staticmethod(ended.append))
    store, made = HashStore(), list[Heart]()

    def one(rank: int, timeout: float = 1000.0, answers: object = store) -> Heart:
        made.append(Heart(answers, rank, 2, timeout))
        return made[-1]

    yield one
    for heart in made:
        heart.ended.set()
        if heart.is_alive() and not isinstance(heart.store, Frozen):
            heart.join(5)  # before ``Heart.end`` ends processes again


class Frozen:
    """A store in a process that is stopped: no call of it returns."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *arguments: threading.Event().wait()


def until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(BEAT / 5)
    return bool(condition())


def test_a_rank_that_waits_too_long_says_who_is_silent_and_ends(make: Made, ended: list[RankError]) -> None:
    lost, waiting = make(0), make(1, 10 * BEAT)
    lost.at("step 7 (step)")
    lost.pulse()
    waiting.at("step 7 (step)")
    waiting.start()
    assert until(lambda: ended)
    assert "(last heard of: rank 0 at step 7 (step))" in str(ended[0])
    assert (ended[0].told, ended[0].lost) == (False, True)
    assert waiting.ended.wait(1)


def test_a_rank_that_lives_and_is_behind_is_named(make: Made, ended: list[RankError]) -> None:
    behind, waiting = make(0), make(1, 10 * BEAT)
    behind.at("step 6 (step)")
    behind.start()
    waiting.at("step 6 (step)")
    waiting.at("step 7 (step)")
    waiting.start()
    assert until(lambda: ended)
    assert "(behind the others: rank 0 at step 6 (step))" in str(ended[0])


def test_of_ranks_in_the_same_phase_one_that_waits_for_nobody_is_named(make: Made, ended: list[RankError]) -> None:
    hangs, waits = make(0), make(1, 10 * BEAT)
    for heart in (hangs, waits):
        heart.at("step 7 (step)")
        heart.start()
    waits.waited = True
    assert until(lambda: ended)
    assert "(behind the others: rank 0 at step 7 (step))" in str(ended[0])


def test_a_rank_that_gets_on_while_it_looks_around_is_not_ended(
    make: Made, ended: list[RankError], monkeypatch: pytest.MonkeyPatch
) -> None:
    heart, looked = make(1, 4 * BEAT), threading.Event()
    look = heart._whereabouts

    def looking(late: bool) -> str:
        found = look(late)
        heart.at("step 8 (step)")
        looked.set()
        heart.timeout = 1000.0
        return found

    monkeypatch.setattr(heart, "_whereabouts", looking)
    heart.start()
    assert looked.wait(20)
    time.sleep(4 * BEAT)
    assert not ended
    assert heart.is_alive()


def test_of_two_threads_that_would_say_why_a_rank_ends_one_does(make: Made, ended: list[RankError]) -> None:
    """The main thread's collective times out when the heart does."""
    make(0).pulse()
    heart = make(1, 6 * BEAT)
    heart.start()
    assert until(lambda: time.monotonic() - heart.since > 6 * BEAT)
    error = heart.explained(DistBackendError("Timed out waiting 1800000ms for recv operation to complete"))
    assert isinstance(error, RankError)
    assert (error.told, error.lost) == (False, True)
    assert "last heard of: rank 0 at the start" in str(error)
    time.sleep(10 * BEAT)
    assert not ended


def test_the_first_to_tell_speaks_and_the_others_say_nothing(make: Made) -> None:
    first, second = make(0), make(1)
    first.pulse()
    second.start()
    own = first.explained(OSError(5, "Input/output error", "a.tar"))
    assert str(own) == "[Errno 5] rank 0: Input/output error: 'a.tar'"
    assert until(lambda: second.told)  # before the first rank's process ends, and the store with it
    heard = second.explained(DistBackendError("Connection closed by peer"))
    assert isinstance(heard, RankError)
    assert (heard.told, heard.lost) == (True, False)
    assert str(heard).endswith("rank 0: [Errno 5] Input/output error: 'a.tar'")


def test_a_store_that_does_not_answer_does_not_hold_a_rank(make: Made, ended: list[RankError]) -> None:
    heart = make(1, 4 * BEAT, Frozen())
    heart.start()
    assert until(lambda: ended)
    time.sleep(8 * BEAT)
    assert len(ended) == 1
    assert "rank 0, which keeps what the ranks tell each other, does not answer" in str(ended[0])


class Gone:
    """A store whose process has ended."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        def fail(*arguments: object) -> object:
            raise RuntimeError("Connection reset by peer")

        return fail


def test_without_a_store_each_rank_says_that_the_first_one_is_gone(make: Made) -> None:
    error = make(1, 1000.0, Gone()).explained(DistBackendError("Connection closed by peer"))
    assert isinstance(error, RankError)
    assert not error.told
    assert "another rank ended or did not answer (rank 0 is gone" in str(error)


def test_a_process_that_was_stopped_itself_goes_on(make: Made, ended: list[RankError]) -> None:
    heart = make(1, 10 * BEAT)
    heart.since = heart.answered = time.monotonic() - 100.0  # as after SIGCONT
    heart.timeout = 50.0
    heart.start()
    time.sleep(1.5 * BEAT)
    heart.at("step 9 (step)")
    time.sleep(6 * BEAT)
    assert not ended


def test_a_rank_that_is_told_while_it_waits_ends_before_its_time(make: Made, ended: list[RankError]) -> None:
    make(0).tell("own", "rank 0: no such shard")
    make(1).start()
    assert until(lambda: ended)
    assert str(ended[0]) == "rank 0: no such shard"
    assert (ended[0].told, ended[0].lost) == (True, False)
