import re
import threading
import time
import traceback

import pytest

from tfm_jax.data.prefetch import Prefetcher


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_items_come_in_order_with_their_step(depth):
    with Prefetcher(lambda step: step * step, 3, 30, depth) as found:
        assert list(found) == [(step, step * step) for step in range(3, 30)]


def test_an_empty_range_has_no_items():
    with Prefetcher(lambda step: step, 5, 5) as found:
        assert list(found) == []


def test_it_works_ahead_by_depth_and_no_further():
    made = []
    with Prefetcher(lambda step: made.append(step), 0, 100, depth=3) as found:
        wait_until(lambda: len(made) == 3)
        time.sleep(0.05)
        assert made == [0, 1, 2]
        next(found)
        wait_until(lambda: len(made) == 4)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]


def test_making_happens_in_another_thread():
    with Prefetcher(lambda step: threading.get_ident(), 0, 1) as found:
        assert next(found)[1] != threading.get_ident()


def explode(step):
    if step == 2:
        raise KeyError("shard 7")
    return step


def test_an_exception_comes_after_the_items_before_it_with_its_own_traceback():
    with Prefetcher(explode, 0, 5, depth=4) as found:
        time.sleep(0.05)  # the thread has failed by now
        assert [next(found), next(found)] == [(0, 0), (1, 1)]
        with pytest.raises(KeyError, match="shard 7") as caught:
            next(found)
        assert "explode" in [frame.name for frame in traceback.extract_tb(caught.tb)]
        with pytest.raises(KeyError, match="shard 7"):  # and again, instead of waiting for ever
            next(found)


def test_close_returns_promptly_when_it_is_full():
    found = Prefetcher(lambda step: step, 0, 10**9, depth=2)
    wait_until(lambda: len(found._ready) == 2)
    started = time.perf_counter()
    found.close()
    assert time.perf_counter() - started < 1
    assert not found._thread.is_alive()
    found.close()
    with pytest.raises(StopIteration):
        next(found)


def test_close_waits_for_the_item_in_the_making_at_most_timeout():
    release = threading.Event()
    found = Prefetcher(lambda step: release.wait(20), 0, 10)
    started = time.perf_counter()
    found.close(timeout=0.1)
    assert 0.1 <= time.perf_counter() - started < 2
    assert found._thread.is_alive()
    release.set()
    found.close()
    assert not found._thread.is_alive()


def test_close_wakes_a_waiting_consumer():
    release, ended = threading.Event(), threading.Event()
    found = Prefetcher(lambda step: release.wait(20), 0, 10)
    consumer = threading.Thread(target=lambda: (list(found), ended.set()), daemon=True)
    consumer.start()
    found.close(timeout=0.05)
    assert ended.wait(5)
    release.set()


def test_leaving_the_block_by_an_exception_stops_the_thread():
    with pytest.raises(RuntimeError, match="step failed"), Prefetcher(lambda step: step, 0, 10**9) as found:
        raise RuntimeError("step failed")
    assert not found._thread.is_alive()


def test_wait_seconds_counts_only_blocked_time():
    def slow(step):
        time.sleep(0.1)
        return step

    with Prefetcher(slow, 0, 3, depth=3) as found:
        time.sleep(0.5)  # all three are ready
        list(found)
        assert found.wait_seconds < 0.05
    with Prefetcher(slow, 0, 3, depth=3) as found:
        began = time.perf_counter()
        list(found)
        assert 0.2 < found.wait_seconds <= time.perf_counter() - began


def test_a_depth_below_one_is_refused():
    with pytest.raises(ValueError, match=re.escape("depth is 0; it must be at least 1.")):
        Prefetcher(lambda step: step, 0, 1, depth=0)
