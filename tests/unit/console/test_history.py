"""The history keeps the first and the last bytes, and knows every byte by its offset."""

import random

import pytest

from propolis.console.history import KEPT_BYTES, ConsoleHistory, GapError


def printed(size: int) -> bytes:
    """Output in which nearly every place looks different."""
    return random.Random(size).randbytes(size)


def read_all(history: ConsoleHistory, start: int, piece: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Everything from `start` on, read in pieces, and the gaps on the way."""
    data, gaps = b"", []
    while start < history.total_bytes:
        try:
            got, after = history.read(from_start=start, max_bytes=piece)
        except GapError as gap:
            gaps.append((gap.offset, gap.resumes_at))
            start = gap.resumes_at
            continue
        assert 0 < len(got) <= piece
        assert after == start + len(got)
        data += got
        start = after
    return data, gaps


def test_nothing_yet() -> None:
    history = ConsoleHistory()
    assert history.total_bytes == 0
    assert history.read(from_start=0) == (b"", 0)
    assert history.read(from_start=99) == (b"", 0)
    assert history.read(most_recent=99) == (b"", 0)


@pytest.mark.parametrize("seed", range(40))
def test_any_sizes_against_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    kept = rng.randrange(1, 40)
    history = ConsoleHistory(kept)
    whole = b""
    for _ in range(rng.randrange(30)):
        data = rng.randbytes(rng.randrange(0, 3 * kept))
        history.append(data)
        whole += data
        total = len(whole)
        assert history.total_bytes == total
        has_gap = total > 2 * kept
        assert history.resumes_at == (total - kept if has_gap else 0)
        got, gaps = read_all(history, 0, rng.randrange(1, 50))
        assert got == (whole[:kept] + whole[-kept:] if has_gap else whole)
        assert gaps == ([(kept, total - kept)] if has_gap else [])
        for start in range(total + 2):
            if has_gap and kept <= start < total - kept:
                with pytest.raises(GapError):
                    history.read(from_start=start)
                continue
            data, after = history.read(from_start=start, max_bytes=7)
            start = min(start, total)
            assert data == whole[start : start + 7][: kept - start if has_gap and start < kept else 7]
            assert after == start + len(data)
        recent = rng.randrange(kept + 1)
        assert history.read(most_recent=recent) == (whole[total - min(recent, total) :], total)


def test_full_size_has_no_gap_up_to_two_mebibytes() -> None:
    history = ConsoleHistory()
    data = printed(2 * KEPT_BYTES)
    for start in range(0, len(data), 1000):
        history.append(data[start : start + 1000])
    assert read_all(history, 0, 16384) == (data, [])
    history.append(b"x")
    assert read_all(history, 0, 16384) == (
        data[:KEPT_BYTES] + data[KEPT_BYTES + 1 :] + b"x",
        [(KEPT_BYTES, KEPT_BYTES + 1)],
    )


def test_the_most_recent_bytes() -> None:
    history = ConsoleHistory(10)
    history.append(b"0123456789abcdefghijKLMNO")
    assert history.read(most_recent=4) == (b"LMNO", 25)
    assert history.read(most_recent=25) == (b"0123456789", 10)
    assert history.read(most_recent=10**30, max_bytes=3) == (b"012", 3)
    with pytest.raises(GapError) as caught:
        history.read(most_recent=11)
    assert (caught.value.offset, caught.value.resumes_at, caught.value.status) == (14, 15, 400)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"from_start": 0, "most_recent": 0},
        {"from_start": -1},
        {"most_recent": -1},
        {"from_start": 0, "max_bytes": -1},
    ],
)
def test_reads_that_mean_nothing(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="console's history"):
        ConsoleHistory().read(**arguments)


def test_reading_nothing() -> None:
    history = ConsoleHistory(2)
    history.append(b"abcdefgh")
    assert history.read(from_start=0, max_bytes=0) == (b"", 0)
    assert history.read(from_start=3, max_bytes=0) == (b"", 3)
