"""When a watch calls something a hang, on a clock that the test sets."""

from embedding_service.sharing.watch import PAUSE_SECONDS, Watch


def looks(watch: Watch, *values: object, first: float = 100.0) -> list[bool]:
    """What the watch says of these values, a second apart."""
    return [watch.is_overdue(value, first + second) for second, value in enumerate(values)]


def test_what_stays_as_it_is_for_too_long_is_overdue():
    assert looks(Watch(3), *"aaaaaa") == [False] * 4 + [True] * 2
    assert not any(looks(Watch(3), *"aaabbbaaab"))


def test_nothing_is_never_overdue():
    assert not any(looks(Watch(3), *[None] * 9, "a", "a", "a"))


def test_a_pause_of_the_whole_machine_does_not_count():
    watch = Watch(3)
    assert not any(looks(watch, *"aaa"))
    after = 102 + PAUSE_SECONDS + 1
    assert looks(watch, *"aaaaa", first=after) == [False] * 4 + [True]
