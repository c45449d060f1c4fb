"""The writer thread: order, backpressure, the memory cap, and errors that reach the caller."""

from __future__ import annotations

import threading

import pytest
import torch

from driftlens.errors import ConfigError, SiteError
from driftlens.recording.queue import WriteQueue
from driftlens.recording.transfer import HostCopy


def test_items_are_consumed_in_order_by_one_other_thread() -> None:
    seen: list[int] = []
    threads: set[int] = set()

    def consume(item: int) -> None:
        seen.append(item)
        threads.add(threading.get_ident())

    with WriteQueue(consume) as queue:
        for number in range(50):
            assert queue.put(number, 1)
    assert seen == list(range(50))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_full_queue_waits_and_drops_nothing() -> None:
    gate, seen = threading.Event(), []
    waiting = threading.Event()

    def consume(item: int) -> None:
        gate.wait(10)
        seen.append(item)

    def produce(queue: WriteQueue[int]) -> None:
        for number in range(6):
            if number == 3:
                waiting.set()
            queue.put(number, 1)

    with WriteQueue(consume, depth=1) as queue:
        producer = threading.Thread(target=produce, args=(queue,))
        producer.start()
        producer.join(0.2)
        assert producer.is_alive(), "the producer is held back while nothing is consumed"
        assert not waiting.is_set()
        gate.set()
        producer.join(10)
    assert seen == list(range(6))


def test_bytes_in_flight_never_exceed_the_cap() -> None:
    in_flight, most, lock = 0, 0, threading.Lock()

    def consume(size: int) -> None:
        nonlocal in_flight
        with lock:
            in_flight -= size

    class Counting(WriteQueue[int]):
        def _has_room(self, size: int) -> bool:
            nonlocal most
            room = super()._has_room(size)
            if room:
                most = max(most, self._bytes + size)
            return room

    with Counting(consume, max_bytes=10, depth=100) as queue:
        for size in (4, 4, 4, 10, 1, 9, 3) * 5:
            queue.put(size, size)
    assert 4 <= most <= 10


def test_a_batch_above_the_cap_names_the_sizes_and_what_to_lower() -> None:
    with (
        WriteQueue(lambda item: None, max_bytes=2_000_000) as queue,
        pytest.raises(ConfigError, match=r"takes 3\.5 MB, and max_buffer_mb allows 2\.0 MB.*Lower the batch size"),
    ):
        queue.put(1, 3_500_000)


@pytest.mark.parametrize("options", [{"depth": 0}, {"max_bytes": 0}])
def test_a_queue_that_holds_nothing_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="can hold nothing"):
        WriteQueue(lambda item: None, **options)


def test_an_error_of_the_writer_reaches_the_caller_with_type_and_message() -> None:
    def consume(item: int) -> None:
        if item == 1:
            raise SiteError("site 7 is broken")

    consumed = threading.Event()
    with pytest.raises(SiteError, match="site 7 is broken"), WriteQueue(consume) as queue:  # noqa: PT012 - the error must strike inside the block
        for number in range(1000):
            queue.put(number, 1)
        consumed.set()
    assert not consumed.is_set(), "the caller is stopped, not told at the end"


def test_an_error_on_the_last_item_is_raised_on_leaving() -> None:
    def consume(item: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), WriteQueue(consume) as queue:
        queue.put(0, 1)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_by_an_exception_discards_what_waits_and_ends_the_thread(error: type[BaseException]) -> None:
    gate, seen = threading.Event(), []

    def consume(item: int) -> None:
        gate.wait(10)
        seen.append(item)

    queue = WriteQueue(consume)
    with pytest.raises(error, match="stop"), queue:  # noqa: PT012 - the error must strike inside the block
        queue.put(0, 1)
        while queue._waiting:
            pass
        queue.put(1, 1)
        threading.Timer(0.05, gate.set).start()
        raise error("stop")
    assert seen == [0], "what was being written is finished, what waited is not begun"
    assert not queue._thread.is_alive()


def test_a_dropping_queue_refuses_instead_of_waiting() -> None:
    gate, seen = threading.Event(), []

    def consume(item: int) -> None:
        gate.wait(10)
        seen.append(item)

    with WriteQueue(consume, depth=1, drop=True) as queue:
        taken = [queue.put(0, 1)]
        while queue._waiting:
            pass
        taken += [queue.put(number, 1) for number in (1, 2, 3)]
        gate.set()
    assert taken == [True, True, False, False]
    assert seen == [0, 1]


def test_a_copy_on_the_cpu_is_the_tensor_itself() -> None:
    source = torch.arange(5.0)
    copy = HostCopy(source)
    assert copy.nbytes == 20
    assert copy.wait().__array_interface__["data"][0] == source.data_ptr()
