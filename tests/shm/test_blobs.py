"""Blobs: what was written is read, without a copy, for as long as somebody looks at it; or taken, by a copy."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import pickle
import random
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import posix_ipc
import pytest
from tests.shm.test_segment import in_a_small_shared_memory, with_mounted
from tests.workers.files.child import Child, say

from ringpool.errors import SegmentFormatError, SegmentMissingError
from ringpool.shm import blobs, segment
from ringpool.shm.layout import Encoding
from ringpool.shm.segment import SHM_DIRECTORY

MIB = 1 << 20


def path_of(name: str) -> Path:
    return Path(SHM_DIRECTORY, name)


def mapped_spans(name: str) -> list[tuple[int, int]]:
    """The address ranges at which this process has mapped the blob, unlinked or not."""
    spans: list[tuple[int, int]] = []
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            if f"{SHM_DIRECTORY}/{name}" in line:
                first, _, last = line.split()[0].partition("-")
                spans.append((int(first, 16), int(last, 16)))
    return spans


def is_inside(array: np.ndarray[Any, Any], spans: list[tuple[int, int]]) -> bool:
    at: int = array.__array_interface__["data"][0]
    return any(first <= at and at + array.nbytes <= last for first, last in spans)


def write_pickled(name: str, value: object) -> int:
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, 5, buffer_callback=buffers.append)
    return blobs.write(name, Encoding.PICKLE, body, [buffer.raw() for buffer in buffers])


def read_pickled(name: str, *, writable: bool = False) -> Any:
    encoding, body, buffers = blobs.read(name, writable=writable)
    assert encoding is Encoding.PICKLE
    return pickle.loads(body, buffers=buffers)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 960, 961, 4095, 4096, 4097, MIB, 50_000_000])
def test_a_body_of_any_size_is_read_as_it_was_written(size: int, stem: str) -> None:
    name = blobs.payload_name(stem, 1)
    body = random.Random(size).randbytes(size)
    size_bytes = blobs.write(name, Encoding.MSGPACK, body)
    assert path_of(name).stat().st_size == size_bytes >= size
    encoding, found, buffers = blobs.read(name)
    assert (encoding, found == body, buffers) == (Encoding.MSGPACK, True, [])


@pytest.mark.parametrize(
    "lengths",
    [(0,), (1,), (64, 64), (0, 0, 0), (5, 0, 7), (4096, 1, 4095), (MIB, 3, MIB + 1), tuple(range(100))],
    ids=str,
)
@pytest.mark.parametrize("writable", [False, True])
def test_buffers_are_read_as_they_were_written(lengths: tuple[int, ...], writable: bool, stem: str) -> None:
    name = blobs.payload_name(stem, 1)
    chance = random.Random(1)
    contents = [chance.randbytes(length) for length in lengths]
    size_bytes = blobs.write(name, Encoding.PICKLE, b"body", [memoryview(content) for content in contents])
    assert path_of(name).stat().st_size == size_bytes
    _, body, buffers = blobs.read(name, writable=writable)
    assert body == b"body"
    assert [bytes(buffer) for buffer in buffers] == contents


def test_the_layout_is_the_one_of_the_table(stem: str) -> None:
    name = blobs.payload_name(stem, 1)
    blobs.write(name, Encoding.PICKLE, b"abc", [memoryview(b"x" * 65), memoryview(b"yy")])
    content = path_of(name).read_bytes()
    assert content[:8] == b"RPBLOB2\0"
    places = ((8, 12), (12, 16), (16, 24), (24, 32), (32, 40), (40, 48))
    numbers = [int.from_bytes(content[at:end], "little") for at, end in places]
    assert numbers == [Encoding.PICKLE, 2, 3, 0, 65, 2]
    assert content[64:67] == b"abc"
    assert content[128:193] == b"x" * 65
    assert content[256:] == b"yy"


def test_what_is_written_from_other_kinds_of_buffers_is_the_same(stem: str) -> None:
    wide = np.arange(12, dtype="<u4").reshape(3, 4)
    write_body = bytearray(b"body")
    blobs.write(blobs.payload_name(stem, 1), Encoding.PICKLE, write_body, [memoryview(wide)])
    _, body, [buffer] = blobs.read(blobs.payload_name(stem, 1))
    assert body == b"body"
    assert bytes(buffer) == wide.tobytes()


def test_everything_is_allocated_and_for_this_user_only(stem: str) -> None:
    name = blobs.payload_name(stem, 1)
    size_bytes = blobs.write(name, Encoding.MSGPACK, bytes(100_000))
    status = path_of(name).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_blocks * 512 >= size_bytes


def test_names_belong_to_their_segment_and_tell_attempts_apart() -> None:
    assert blobs.payload_name("rp.1", 7) == "rp.1.t7"
    assert blobs.function_name("rp.1", 7) == "rp.1.f7"
    assert blobs.result_name("rp.1", 7, 0) == "rp.1.r7.0"
    assert blobs.result_name("rp.1", 7, 1) == "rp.1.r7.1"


def test_a_segments_blobs_go_with_it(stem: str) -> None:
    for name in (blobs.payload_name(stem, 1), blobs.function_name(stem, 2), blobs.result_name(stem, 3, 0)):
        blobs.write(name, Encoding.MSGPACK, b"x")
    segment.unlink(stem)
    assert [file for file in os.listdir(SHM_DIRECTORY) if stem in file] == []


# ---- views -----------------------------------------------------------------------------------------------------------


def test_an_array_in_a_reader_is_read_only_and_lies_in_the_mapping(stem: str) -> None:
    name = blobs.payload_name(stem, 1)
    array = np.arange(100_000, dtype=np.float64).reshape(100, 1000)
    write_pickled(name, {"array": array, "few": 1})
    found = read_pickled(name)["array"]
    assert np.array_equal(found, array)
    assert not found.flags.writeable
    assert found.__array_interface__["data"][0] % blobs.ALIGN_BYTES == 0
    assert is_inside(found, mapped_spans(name))
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 1


@pytest.mark.parametrize("n", [1_000, 100_000, blobs.HEAP_MAX_BYTES // 8])
def test_a_writable_array_is_a_copy(n: int, stem: str) -> None:
    name = blobs.payload_name(stem, 1)
    array = np.arange(n)
    write_pickled(name, array)
    first, second = read_pickled(name, writable=True), read_pickled(name, writable=True)
    assert mapped_spans(name) == []
    assert first.__array_interface__["data"][0] % blobs.ALIGN_BYTES == 0
    first[:] = -1
    assert np.array_equal(second, array)
    assert np.array_equal(read_pickled(name), array)


def test_the_views_of_a_reader_may_not_be_written(stem: str) -> None:
    name = blobs.payload_name(stem, 1)
    blobs.write(name, Encoding.PICKLE, b"body", [memoryview(b"buffer")])
    _, body, [buffer] = blobs.read(name)
    assert body.readonly
    assert buffer.readonly


def test_an_unlinked_blob_lives_as_long_as_its_views(stem: str) -> None:
    name = blobs.payload_name(stem, 1)
    array = np.arange(1_000_000)
    write_pickled(name, (array, array + 1))
    first, second = read_pickled(name)
    blobs.unlink(name)
    assert not path_of(name).exists()
    assert np.array_equal(first, array)
    del first
    gc.collect()
    assert mapped_spans(name), "the mapping went while a view was there"
    assert np.array_equal(second, array + 1)
    del second
    gc.collect()
    assert mapped_spans(name) == []


def test_its_memory_is_freed_with_its_last_view() -> None:
    """In a shared memory of its own, so that what is in use there is what this blob uses."""
    said = in_a_small_shared_memory(
        4096,
        """
import gc, os
from ringpool.shm import blobs
from ringpool.shm.layout import Encoding
def used():
    room = os.statvfs("/dev/shm")
    return (room.f_blocks - room.f_bfree) * room.f_frsize
blobs.write("b", Encoding.PICKLE, b"body", [memoryview(bytes(1 << 20))])
print(used() > 1 << 20)
_, _, [view] = blobs.read("b")
blobs.unlink("b")
print(used() > 1 << 20, len(bytes(view)))
del view, _
gc.collect()
print(used())
""",
    )
    assert said.splitlines() == ["True", f"True {MIB}", "0"]


def test_what_is_taken_is_in_shared_memory_no_more() -> None:
    said = in_a_small_shared_memory(
        4096,
        """
import os
from ringpool.shm import blobs
from ringpool.shm.layout import Encoding
for n_bytes in (1 << 10, 1 << 20):
    blobs.write("b", Encoding.PICKLE, b"body", [memoryview(b"x" * n_bytes)])
    _, _, [view] = blobs.take("b")
    room = os.statvfs("/dev/shm")
    print(bytes(view) == b"x" * n_bytes, os.listdir("/dev/shm"), room.f_blocks - room.f_bfree)
""",
    )
    assert said.splitlines() == ["True [] 0"] * 2


def test_a_blob_written_by_one_process_is_read_by_another(stem: str) -> None:
    name = blobs.result_name(stem, 5, 1)
    with Child(write_an_array, name) as child:
        child.wait_for("written")
        child.succeed()
    assert read_pickled(name, writable=True).sum() == 499_500


def write_an_array(name: str) -> None:
    write_pickled(name, np.arange(1000))
    say("written")


# ---- what can go wrong -----------------------------------------------------------------------------------------------


def test_a_missing_blob_is_named() -> None:
    with pytest.raises(SegmentMissingError, match="rp\\.none\\.t1: the blob is gone"):
        blobs.read("rp.none.t1")


def test_what_cannot_be_read_for_want_of_a_descriptor_can_be_taken_later(
    stem: str, no_descriptors: Callable[[], AbstractContextManager[None]]
) -> None:
    name = blobs.result_name(stem, 1, 0)
    blobs.write(name, Encoding.PICKLE, b"body")
    with no_descriptors(), pytest.raises(OSError, match="open"):
        blobs.take(name)
    _, body, _ = blobs.take(name)
    assert body == b"body"
    assert not blobs.exists(name)


def test_what_is_no_blob_is_taken_all_the_same(stem: str) -> None:
    """Nobody will ever read it."""
    name = blobs.result_name(stem, 1, 0)
    path_of(name).write_bytes(bytes(100))
    with pytest.raises(SegmentFormatError, match="wrong magic number"):
        blobs.take(name)
    assert not blobs.exists(name)


def test_unlinking_what_is_not_there_is_nothing_to_do(stem: str) -> None:
    blobs.unlink(blobs.payload_name(stem, 1))
    blobs.write(blobs.payload_name(stem, 1), Encoding.MSGPACK, b"x")
    blobs.unlink(blobs.payload_name(stem, 1))
    blobs.unlink(blobs.payload_name(stem, 1))
    assert not path_of(blobs.payload_name(stem, 1)).exists()


def test_no_room_for_it_is_an_error_that_leaves_nothing() -> None:
    said = in_a_small_shared_memory(
        1024,
        """
import os
from ringpool.errors import SharedMemoryFullError
from ringpool.shm import blobs
from ringpool.shm.layout import Encoding
for body, buffers in ((bytes(1 << 21), ()), (b"", [memoryview(bytes(1 << 20))]), (bytes(1 << 19),) * 2):
    try:
        blobs.write("b", Encoding.PICKLE, body, [memoryview(buffers)] if isinstance(buffers, bytes) else buffers)
    except SharedMemoryFullError as error:
        print(error.name, error.reason, os.listdir("/dev/shm"), os.statvfs("/dev/shm").f_bfree)
print(blobs.write("b", Encoding.PICKLE, bytes(1 << 19)) >= 1 << 19)
""",
    )
    *errors, last = said.splitlines()
    sizes = ["2,097,216", "1,048,640", "1,048,640"]
    assert errors == [f"b /dev/shm has no room for {size} bytes [] 256" for size in sizes]
    assert last == "True"


def test_a_limit_of_the_size_of_files_is_not_meant_for_blobs() -> None:
    """As a task may set one. Where it cannot be lifted, the error says so."""
    said = in_a_small_shared_memory(
        1024,
        """
import os, resource
from ringpool.errors import SharedMemoryUnusableError
from ringpool.shm import blobs
from ringpool.shm.layout import Encoding
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 1 << 30))
print(blobs.write("b", Encoding.PICKLE, bytes(1 << 19)) >= 1 << 19, *resource.getrlimit(resource.RLIMIT_FSIZE))
blobs.unlink("b")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    blobs.write("b", Encoding.PICKLE, bytes(1 << 19))
except SharedMemoryUnusableError as error:
    print(error.name, "RLIMIT_FSIZE" in error.reason, os.listdir("/dev/shm"))
""",
    )
    assert said.splitlines() == ["True 100 1073741824", "b True []"]


def test_a_write_that_fails_half_way_leaves_nothing(stem: str) -> None:
    name = blobs.payload_name(stem, 1)
    with mmap.mmap(-1, 4096) as page, memoryview(page) as view:
        scattered = view[::2]  # memory that is not in one piece cannot be copied as bytes
        with pytest.raises(TypeError):
            blobs.write(name, Encoding.PICKLE, b"body", [scattered])
        scattered.release()
    assert not path_of(name).exists()


@pytest.mark.parametrize("former", [1, 5_000, 300_000])
@pytest.mark.parametrize("size", [1, 5_000, 300_000])
def test_a_spare_is_written_over_and_is_another_blob_then(stem: str, former: int, size: int) -> None:
    spare, name = blobs.payload_spare_name(stem, 1), blobs.payload_name(stem, 2)
    blobs.write(spare, Encoding.MSGPACK, b"o" * former, [memoryview(b"o" * former)])
    blobs.release(spare, 3)
    inode = path_of(spare).stat().st_ino
    buffers = [memoryview(b"n" * size), memoryview(b"")]
    n_bytes = blobs.write(name, Encoding.PICKLE, b"new", buffers, [blobs.payload_spare_name(stem, 9), spare])
    assert path_of(name).stat().st_ino == inode
    assert path_of(name).stat().st_size == n_bytes == blobs.size_of(b"new", buffers)
    assert not path_of(spare).exists()
    encoding, body, found = blobs.read(name)
    assert (encoding, bytes(body), [bytes(each) for each in found]) == (Encoding.PICKLE, b"new", [b"n" * size, b""])
    assert not blobs.is_released(name, 3)


def test_a_spare_that_cannot_be_opened_is_removed(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spare, name = blobs.payload_spare_name(stem, 1), blobs.payload_name(stem, 2)
    blobs.write(spare, Encoding.PICKLE, b"body")

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(posix_ipc, "SharedMemory", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            blobs.write(name, Encoding.PICKLE, b"body", [], [spare])
    assert not path_of(spare).exists()
    assert not path_of(name).exists()


@pytest.mark.parametrize(("size", "is_kept"), [((1 << 20) - 1, True), (1 << 20, False)])
def test_no_blob_is_spare_that_is_not_taken_for_one(stem: str, size: int, is_kept: bool) -> None:
    """By their binary digits: 1 MiB has as many as what is larger."""
    name, spare = blobs.payload_name(stem, 1), blobs.payload_spare_name(stem, 1)
    blobs.write(name, Encoding.PICKLE, bytes(100))
    assert blobs.keep_spare(name, size, spare) == is_kept
    assert path_of(spare).exists() == is_kept


def test_a_blob_is_released_by_the_attempt_that_says_so(stem: str) -> None:
    name = blobs.payload_name(stem, 1)
    blobs.write(name, Encoding.PICKLE, b"body")
    blobs.release(name, 0)
    assert [blobs.is_released(name, attempt) for attempt in (0, 1, 2)] == [True, False, False]
    blobs.release(name, 1)
    assert [blobs.is_released(name, attempt) for attempt in (0, 1, 2)] == [False, True, False]
    blobs.unlink(name)
    blobs.release(name, 0)
    assert not blobs.is_released(name, 0)


def test_where_there_is_no_room_spares_make_some() -> None:
    said = in_a_small_shared_memory(
        1024,
        """
import os
from ringpool.shm import blobs
from ringpool.shm.layout import Encoding
spares = [blobs.payload_spare_name("rp.x", number) for number in range(3)]
for spare in spares:
    blobs.write(spare, Encoding.PICKLE, bytes(200_000))
blobs.write("rp.x.t1", Encoding.PICKLE, bytes(900_000), [], spares)
print(os.listdir("/dev/shm"))
""",
    )
    assert said.splitlines() == ["['rp.x.t1']"]


def test_a_shared_memory_without_an_inode_left_is_full() -> None:
    said = with_mounted(
        f"mount -t tmpfs -o size=1m,nr_inodes=3 none {SHM_DIRECTORY}",
        """
from ringpool.errors import SharedMemoryFullError
from ringpool.shm import blobs
from ringpool.shm.layout import Encoding

for number in range(3):
    try:
        blobs.write(f"rp-test-{number}", Encoding.PICKLE, b"x")
        print("written")
    except SharedMemoryFullError as error:
        print(error)
""",
    )
    assert said.splitlines()[:2] == ["written"] * 2
    assert "/dev/shm has no room for another file: no inode is left" in said.splitlines()[2]
