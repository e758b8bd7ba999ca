"""Segments: what may be attached, what is refused and why, and what is removed once its owner is dead."""

from __future__ import annotations

import mmap
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.opcodes import Bytecodes, interrupt_before, kill_before
from tests.workers.files.child import Child, listen, say

from ringpool.coordinator.leftovers import reclaim_dead
from ringpool.errors import (
    SegmentBusyError,
    SegmentError,
    SegmentFormatError,
    SegmentIncompleteError,
    SegmentMissingError,
    SegmentPermissionError,
    SegmentTruncatedError,
    SharedMemoryFullError,
)
from ringpool.shm import dispatch, layout, lock, owner, segment
from ringpool.shm.dispatch import CoordinatorEnd, Task
from ringpool.shm.owner import Owner
from ringpool.shm.segment import SHM_DIRECTORY, Segment

Make = Callable[..., Segment]
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def path_of(name: str) -> Path:
    return Path(SHM_DIRECTORY, name)


def files_of(name: str) -> list[str]:
    return sorted(file for file in os.listdir(SHM_DIRECTORY) if name in file)


def overwrite(name: str, at: int, content: bytes) -> None:
    with open(path_of(name), "r+b") as file:
        file.seek(at)
        file.write(content)


def rewrite_header(name: str, **fields: object) -> None:
    """Other ``fields`` in the header, under a checksum that is right again."""
    with open(path_of(name), "r+b") as file:
        header = layout.Header._make(layout.HEADER.unpack(file.read(layout.HEADER.size)))
        file.seek(0)
        file.write(layout.HEADER.pack(*header._replace(**fields)))
        file.seek(0)
        head = file.read(layout.HEADER_BYTES)
        file.seek(layout.CRC_AT)
        file.write(struct.pack("<Q", zlib.crc32(head[8 : layout.CRC_AT])))


# ---- create ----------------------------------------------------------------------------------------------------------


def test_a_new_segment_is_what_was_asked_for(make_segment: Make) -> None:
    made = make_segment(slots=5, workers=3, claims_max=2)
    header = layout.Header._make(layout.HEADER.unpack_from(made.mapping))
    assert header == made.header
    assert (header.slots, header.workers, header.claims_max) == (5, 3, 2)
    assert (header.magic, header.version, header.format_id) == (layout.MAGIC, layout.VERSION, layout.FORMAT_ID)
    assert Owner(header.creator_pid, header.creator_start) == owner.this_process()
    assert made.mapping[:8] == b"RINGPOOL"
    assert not any(made.mapping[layout.VERSION_WORD_AT :])


def test_all_of_it_is_allocated_when_it_is_made(make_segment: Make) -> None:
    made = make_segment(slots=300)
    status = path_of(made.name).stat()
    assert status.st_size == made.header.size_bytes == len(made.mapping)
    assert status.st_blocks * 512 >= status.st_size


def test_nobody_else_may_open_it(make_segment: Make) -> None:
    former = os.umask(0)
    try:
        made = make_segment()
    finally:
        os.umask(former)
    for name in files_of(made.name):
        assert stat.S_IMODE(path_of(name).stat().st_mode) == 0o600, name


def test_it_has_a_semaphore_for_each_worker_and_one_for_the_coordinator(make_segment: Make) -> None:
    made = make_segment(workers=3)
    assert files_of(made.name) == sorted([made.name, *(f"sem.{made.name}.{who}" for who in (0, 1, 2, "c"))])
    for who in (0, 1, 2, segment.COORDINATOR_SEMAPHORE):
        semaphore = made.semaphore(who)
        assert semaphore.value == 0
        semaphore.close()
    with pytest.raises(SegmentMissingError, match="its semaphore 3 is gone"):
        made.semaphore(3)


@pytest.mark.parametrize(
    ("counts", "what"),
    [
        ((0, 1, 1), "slots"),
        ((-1, 1, 1), "slots"),
        ((layout.SLOTS_MAX + 1, 1, 1), "slots"),
        ((1, 0, 1), "workers"),
        ((1, layout.WORKERS_MAX + 1, 1), "workers"),
        ((1, 1, 0), "claims_max"),
        ((1, 1, layout.CLAIMS_MAX + 1), "claims_max"),
    ],
)
def test_counts_out_of_range_are_refused(counts: tuple[int, int, int], what: str) -> None:
    with pytest.raises(ValueError, match=rf"^{what} must be from 1 to \d+, not -?\d+$"):
        segment.create(*counts)


def test_the_smallest_and_the_widest_can_be_attached(make_segment: Make) -> None:
    for counts in ((1, 1, 1), (1, layout.WORKERS_MAX, layout.CLAIMS_MAX)):
        made = make_segment(*counts)
        attached = segment.attach(made.name)
        assert attached.header == made.header
        attached.close()


def test_no_room_for_it_is_an_error_that_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    places = layout.sections(8, 2, 4)
    monkeypatch.setattr(layout, "sections", lambda *_: places._replace(size_bytes=1 << 60))
    with pytest.raises(
        SharedMemoryFullError, match=r"has no room for 1,152,921,504,606,846,976 bytes; free space"
    ) as e:
        segment.create(8, 2, 4)
    assert files_of(e.value.name) == []


def in_a_small_shared_memory(kib: int, code: str) -> str:
    """What ``code`` prints in a mount namespace of its own, where ``/dev/shm`` has ``kib`` KiB."""
    return with_mounted(f"mount -t tmpfs -o size={kib}k none {SHM_DIRECTORY}", code)


def with_mounted(mount: str, code: str, *, map_user: bool = True) -> str:
    """What ``code`` prints in a mount namespace of its own, after that command."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare(1) is not installed")
    namespace = [unshare, *(["--map-root-user"] if map_user else []), "--mount"]
    if subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", SHM_DIRECTORY], capture_output=True).returncode:
        pytest.skip("this user may not mount in a namespace of its own")
    script = f'{mount} && exec "$0" -c "$1"'
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [*namespace, "sh", "-c", script, sys.executable, code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def test_a_full_shared_memory_is_an_error_that_leaves_nothing() -> None:
    """Of all sizes: far too large, and by each page that may be the one that is missing, its semaphores' too."""
    said = in_a_small_shared_memory(
        1024,
        """
import os
from ringpool.errors import SharedMemoryFullError
from ringpool.shm import layout, segment
by_pages = {layout.sections(slots, 2, 64).size_bytes // 4096: slots for slots in (*range(1, 600), 2000, 100_000)}
for pages in filter(lambda pages: pages > 240, by_pages):
    try:
        made = segment.create(by_pages[pages], 2, 64)
        outcome = f"made {len(os.listdir('/dev/shm'))}"
        segment.unlink(made.name)
        made.close()
    except SharedMemoryFullError as error:
        outcome = str(error).partition("; ")[2]
    print(outcome, os.listdir("/dev/shm"), os.statvfs("/dev/shm").f_bfree)
""",
    )
    remedy = "free space in /dev/shm, enlarge it (docker run --shm-size), or ask for less"
    assert set(said.splitlines()) == {"made 4 [] 256", f"{remedy} [] 256"}


CREATE = """
from ringpool.coordinator.leftovers import reclaim_dead
from ringpool.errors import SharedMemoryUnusableError
from ringpool.shm import segment
reclaim_dead(), segment.dead_kept()
try:
    segment.create(8, 2, 4)
except SharedMemoryUnusableError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        (f"mount -t tmpfs -o ro none {SHM_DIRECTORY}", "/dev/shm is mounted read-only"),
        ("mount -t tmpfs none /dev", "there is no directory /dev/shm"),
    ],
)
def test_a_shared_memory_where_nothing_can_be_made_is_an_error_that_says_so(mount: str, reason: str) -> None:
    assert f": {reason}; a pool makes files of some MB" in with_mounted(mount, CREATE)


def test_a_limit_of_file_sizes_is_an_error_that_says_so() -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-c", limit + CREATE + "import os; print(os.getpid())"]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    assert "bytes, by its RLIMIT_FSIZE (ulimit -f); " in said
    pid = said.split()[-1]
    assert [name for name in os.listdir(SHM_DIRECTORY) if f".{pid}." in name] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_shared_memory_of_others_is_an_error_that_says_so() -> None:
    # imported by who may read all
    code = (
        "import os\nfrom ringpool.coordinator import leftovers\nos.seteuid(1)\n" + CREATE
    )  # who may read all, imports
    said = with_mounted(f"mount -t tmpfs -o mode=0755 none {SHM_DIRECTORY}", code, map_user=False)
    assert ": user 1 may not write in /dev/shm; " in said


# ---- attach ----------------------------------------------------------------------------------------------------------

DAMAGES: list[tuple[str, Callable[[str], object], type[SegmentError], str]] = [
    ("missing", lambda name: path_of(name).unlink(), SegmentMissingError, "there is none of that name"),
    ("empty", lambda name: os.truncate(path_of(name), 0), SegmentIncompleteError, "it is not ready"),
    ("cut within the magic", lambda name: os.truncate(path_of(name), 7), SegmentIncompleteError, "it is not ready"),
    ("zeros", lambda name: path_of(name).write_bytes(bytes(9000)), SegmentIncompleteError, "it is not ready"),
    ("half made", lambda name: overwrite(name, 0, bytes(8)), SegmentIncompleteError, "has not finished it"),
    ("foreign magic", lambda name: overwrite(name, 0, b"PINGPOOL"), SegmentFormatError, "wrong magic number"),
    ("foreign bytes", lambda name: path_of(name).write_bytes(b"text\n" * 99), SegmentFormatError, "wrong magic"),
    ("magic and no more", lambda name: os.truncate(path_of(name), 8), SegmentTruncatedError, "it has 8 bytes"),
    ("cut in the header", lambda name: os.truncate(path_of(name), 255), SegmentTruncatedError, "it has 255 bytes"),
    ("header and no more", lambda name: os.truncate(path_of(name), 256), SegmentTruncatedError, "it has 256 of "),
    ("next version", lambda name: rewrite_header(name, version=2), SegmentFormatError, "layout version 2, and this"),
    ("version only", lambda name: overwrite(name, 8, b"\x07"), SegmentFormatError, "it has layout version 7"),
    ("checksum", lambda name: overwrite(name, layout.CRC_AT, bytes(8)), SegmentFormatError, "checksum does not match"),
    ("reserved byte", lambda name: overwrite(name, 0xF0, b"\x01"), SegmentFormatError, "checksum does not match"),
    ("other structs", lambda name: rewrite_header(name, format_id=1), SegmentFormatError, "another build"),
    ("other machine", lambda name: rewrite_header(name, machine=8), SegmentFormatError, "another kind of machine"),
    ("big-endian", lambda name: rewrite_header(name, byte_order=2), SegmentFormatError, "another kind of machine"),
    ("other mutex size", lambda name: rewrite_header(name, mutex_bytes=32), SegmentFormatError, "kind of machine"),
    ("other C library", lambda name: rewrite_header(name, libc_minor=99), SegmentFormatError, "kind of machine"),
    ("other boot", lambda name: rewrite_header(name, boot_id=bytes(16)), SegmentFormatError, "on another boot"),
    ("other namespace", lambda name: rewrite_header(name, pid_namespace=1), SegmentFormatError, "pid namespace"),
    ("no slots", lambda name: rewrite_header(name, slots=0), SegmentFormatError, "not where they belong"),
    ("too many slots", lambda name: rewrite_header(name, slots=1 << 22), SegmentFormatError, "not where they belong"),
    ("more slots", lambda name: rewrite_header(name, slots=999), SegmentFormatError, "not where they belong"),
    ("65 workers", lambda name: rewrite_header(name, workers=65), SegmentFormatError, "not where they belong"),
    ("no claims", lambda name: rewrite_header(name, claims_max=0), SegmentFormatError, "not where they belong"),
    ("moved section", lambda name: rewrite_header(name, done_at=4096), SegmentFormatError, "not where they belong"),
    ("huge size", lambda name: rewrite_header(name, size_bytes=1 << 60), SegmentFormatError, "not where they belong"),
    (
        "plain mutex",
        lambda name: overwrite(name, layout.MUTEX_AT + lock.KIND_AT, bytes(4)),
        SegmentFormatError,
        "not a robust, process-shared mutex",
    ),
]


@pytest.mark.parametrize(
    ("damage", "error", "reason"), [row[1:] for row in DAMAGES], ids=[row[0].replace(" ", "-") for row in DAMAGES]
)
def test_a_damaged_segment_is_refused(
    damage: Callable[[str], object], error: type[SegmentError], reason: str, make_segment: Make
) -> None:
    made = make_segment()
    damage(made.name)
    with pytest.raises(error, match=re.escape(reason)) as caught:
        segment.attach(made.name)
    assert type(caught.value) is error
    assert caught.value.name == made.name
    assert str(caught.value).startswith(f"shared memory segment {made.name}: ")


def test_any_flipped_bit_of_the_header_is_noticed(make_segment: Make) -> None:
    made = make_segment()
    head = path_of(made.name).read_bytes()[: layout.HEADER_BYTES]
    for bit in range(8 * layout.HEADER_BYTES):
        at = bit // 8
        overwrite(made.name, at, bytes([head[at] ^ 1 << bit % 8]))
        with pytest.raises(SegmentFormatError):
            segment.attach(made.name)
        overwrite(made.name, at, head[at : at + 1])
    segment.attach(made.name).close()


def test_a_cut_at_any_length_is_noticed(make_segment: Make) -> None:
    made = make_segment()
    whole = path_of(made.name).read_bytes()
    pages = {page + by for page in range(0, len(whole), mmap.PAGESIZE) for by in (-1, 0, 1)}
    for length in sorted({*range(300), *pages, len(whole) - 1} & set(range(len(whole)))):
        path_of(made.name).write_bytes(whole[:length])
        with pytest.raises(SegmentIncompleteError if length < 8 else SegmentTruncatedError):
            segment.attach(made.name)
    path_of(made.name).write_bytes(whole)
    segment.attach(made.name).close()


def test_a_longer_file_is_no_harm(make_segment: Make) -> None:
    made = make_segment()
    os.truncate(path_of(made.name), made.header.size_bytes + 1)
    attached = segment.attach(made.name)
    assert len(attached.mapping) == made.header.size_bytes
    attached.close()


@as_root
def test_root_does_not_attach_what_belongs_to_another_user(make_segment: Make) -> None:
    made = make_segment()
    os.chown(path_of(made.name), NOBODY, NOBODY)
    with pytest.raises(SegmentPermissionError, match="it belongs to user 65534, and this is user 0"):
        segment.attach(made.name)


@as_root
def test_another_user_does_not_attach_it(make_segment: Make) -> None:
    made = make_segment()
    with Child(attach_as_nobody, made.name) as child:
        child.wait_for(f"shared memory segment {made.name}: it belongs to another user; attach as the user who made it")


def attach_as_nobody(name: str) -> None:
    os.setuid(NOBODY)
    with pytest.raises(SegmentPermissionError) as caught:
        segment.attach(name)
    say(str(caught.value))


def test_what_one_process_writes_another_reads(make_segment: Make) -> None:
    made = make_segment()
    with Child(attach_and_mark, made.name) as child:
        child.wait_for("marked")
        assert made.mapping[-1:] == b"\x5a"


def attach_and_mark(name: str) -> None:
    segment.attach(name).mapping[-1:] = b"\x5a"
    say("marked")


def test_an_attached_segment_outlives_its_name(make_segment: Make) -> None:
    made = make_segment()
    attached = segment.attach(made.name)
    segment.unlink(made.name)
    assert files_of(made.name) == []
    attached.mapping[-1:] = b"\x01"
    assert made.mapping[-1:] == b"\x01"
    attached.close()
    with pytest.raises(SegmentMissingError):
        segment.attach(made.name)


# ---- contents that nobody wrote --------------------------------------------------------------------------------------


def scribble(mapping: mmap.mmap, chance: random.Random) -> None:
    """Random bytes, words or extremes in the body of a segment; its header and the kind of its mutex stay."""
    kind = lock.mutex_kind(mapping, layout.MUTEX_AT)
    how = chance.randrange(4)
    if how == 0:
        mapping[layout.MUTEX_AT :] = chance.randbytes(len(mapping) - layout.MUTEX_AT)
    elif how == 1:
        mapping[layout.MUTEX_AT :] = chance.choice((b"\xff", b"\x01", b"\x80")) * (len(mapping) - layout.MUTEX_AT)
    else:
        for _ in range(chance.randrange(1, 40)):
            last = chance.choice((layout.WORKERS_AT + 1024, len(mapping))) // 8
            word = chance.choice((1, 2, 7, 9, 64, 1 << 16, 1 << 22, 1 << 36, (1 << 64) - 1, chance.getrandbits(64)))
            first = chance.choice((layout.MUTEX_AT, layout.VERSION_WORD_AT)) // 8
            struct.pack_into("<Q", mapping, 8 * chance.randrange(first, last), word)
    mapping[layout.MUTEX_AT + lock.KIND_AT : layout.MUTEX_AT + lock.KIND_AT + 4] = kind


def take_over_scribbled(first: str, last: str) -> None:
    dispatch.ATTACH_LOCK_TIMEOUT_S = 0.01
    taken = 0
    for seed in range(int(first), int(last)):
        made = segment.create(8, 2, 4)
        try:
            scribble(made.mapping, random.Random(seed))
            taken += takes_over(made, seed)
        finally:
            segment.unlink(made.name)
            made.close()
    say(f"ended, {'some' if 0 < taken < int(last) - int(first) else taken} taken over")


def takes_over(made: Segment, seed: int) -> bool:
    """Whether the coordinator's end could be had, and then worked; otherwise it gave one of the two errors."""
    try:
        end = CoordinatorEnd(segment.attach(made.name))
    except (SegmentFormatError, SegmentBusyError):
        return False
    except BaseException as error:
        say(f"seed {seed}: {error!r}")
        raise
    try:
        free = end.n_free
        slots = end.publish([Task(1, b"x")] * free)
        assert len(set(slots)) == free
        assert end.n_free == 0
    except SegmentFormatError:
        return False
    except BaseException as error:
        say(f"seed {seed}: {error!r}")
        raise
    finally:
        end.close()
    return True


@pytest.mark.parametrize("first", [0, 500])
def test_a_body_of_random_bytes_is_refused_or_works(first: int) -> None:
    """In another process: what is not to happen is a crash, or a wait without end, which the test's limit would end."""
    with Child(take_over_scribbled, str(first), str(first + 500)) as child:
        child.wait_for("ended, some taken over")
        child.succeed()


def test_random_files_are_refused(make_segment: Make) -> None:
    chance = random.Random(1)
    made = make_segment()
    head = path_of(made.name).read_bytes()[: layout.HEADER_BYTES]
    for _ in range(2000):
        kept = chance.choice((0, 8, 12, 16))
        path_of(made.name).write_bytes(head[:kept] + chance.randbytes(chance.randrange(600)))
        with pytest.raises((SegmentFormatError, SegmentTruncatedError, SegmentIncompleteError)):
            segment.attach(made.name)


# ---- whose it is, and what is removed --------------------------------------------------------------------------------


def test_a_name_says_whom_it_belongs_to(make_segment: Make) -> None:
    made = make_segment()
    for name in (made.name, f"sem.{made.name}.0", f"sem.{made.name}.c", f"{made.name}.t1", f"{made.name}.r7.0"):
        assert segment.owner_of(name) == owner.this_process()


@pytest.mark.parametrize(
    "name",
    ["", "rp", "psm_12ab34cd", "sem.mp-abcd", "rp.x.1.2.0123abcd", "rp.1.2.3.short", "xrp.1.2.3.0123abcd"],
)
def test_a_foreign_name_belongs_to_nobody_we_know(name: str) -> None:
    assert segment.owner_of(name) is None


def test_a_name_of_another_pid_namespace_belongs_to_nobody_we_can_judge() -> None:
    assert segment.owner_of(f"rp.{owner.pid_namespace() + 1}.1.1.0123abcd") is None


def plant(directory: Path, namespace: int, who: Owner, token: str, parts: str = "s 0 c t1 r5.0") -> list[str]:
    """The files of one segment; ``parts``: the segment (s), its semaphores and its blobs."""
    name = f"rp.{namespace}.{who.pid}.{who.start}.{token}"
    names = [name if p == "s" else f"sem.{name}.{p}" if p in "0c" else f"{name}.{p}" for p in parts.split()]
    for file in names:
        (directory / file).write_bytes(b"x")
    return names


def test_exactly_what_the_dead_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "SHM_DIRECTORY", str(tmp_path))
    me, here = owner.this_process(), owner.pid_namespace()
    dead, nobody = Owner(me.pid, me.start + 1), Owner(1 << 22, 5)
    kept = plant(tmp_path, here, me, "00000001")  # alive
    kept += plant(tmp_path, here + 1, dead, "00000002")  # in another pid namespace
    for foreign in ("psm_12345678", "sem.other", "rp.notes", f"xrp.{here}.{nobody.pid}.5.00000003"):
        (tmp_path / foreign).write_bytes(b"")
        kept.append(foreign)
    if os.geteuid() == 0:
        anothers = plant(tmp_path, here, nobody, "00000004")
        for file in anothers:
            os.chown(tmp_path / file, NOBODY, NOBODY)
        kept += anothers
    gone = plant(tmp_path, here, dead, "0000000a")
    gone += plant(tmp_path, here, nobody, "0000000b")
    gone += plant(tmp_path, here, nobody, "0000000c", "c")  # what a reclaim that was cut short has left
    gone += plant(tmp_path, here, nobody, "0000000d", "r5.0")

    assert reclaim_dead() == sorted(
        {name.removeprefix("sem.")[:-2] for name in gone if name.endswith(".c")} | {gone[-1].removesuffix(".r5.0")}
    )
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    assert reclaim_dead() == []


def test_a_killed_owners_segment_is_removed_and_a_living_ones_stays(make_segment: Make) -> None:
    mine = make_segment()
    with Child(make_and_wait) as child, Child(make_and_wait) as living:
        names = [_name_said_by(child), _name_said_by(living)]
        reclaim_dead()
        assert all(path_of(name).exists() for name in names)
        child.kill()
        reclaim_dead()
        assert files_of(names[0]) == []
        assert len(files_of(names[1])) == len(files_of(mine.name)) == 4
        segment.unlink(names[1])


def make_and_wait() -> None:
    made = segment.create(8, 2, 4)
    say(made.name)
    listen()


def _name_said_by(child: Child) -> str:
    assert child.process.stdout is not None
    return child.process.stdout.readline().decode().strip()


def bytecodes_of_create() -> int:
    with Bytecodes(lambda _: None) as whole:
        made = segment.create(8, 2, 4)
    segment.unlink(made.name)
    return whole.n


def create_and_die_everywhere(step: str) -> None:
    """Creators that die at every ``step``-th bytecode of ``create``: says their pids, and how many left something."""
    n_left = 0
    for at in range(1, bytecodes_of_create() + 1, int(step)):
        pid = os.fork()
        if pid == 0:
            with Bytecodes(kill_before(at)):
                segment.create(8, 2, 4)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        n_left += bool(files_of(f".{pid}."))
        say(str(pid))
    say(f"{n_left > 10}")


def test_a_creator_that_is_killed_anywhere_leaves_nothing_that_is_not_reclaimed(make_segment: Make) -> None:
    mine = make_segment()
    with Child(create_and_die_everywhere, "7") as child:
        assert child.process.stdout is not None
        *pids, left = child.process.stdout.read().decode().split()
    assert len(pids) > 20
    assert left == "True", "none was killed where it mattered"
    reclaim_dead()
    namespace = owner.pid_namespace()
    assert [file for pid in pids for file in files_of(f"rp.{namespace}.{pid}.")] == []
    assert len(files_of(mine.name)) == 4


def test_a_half_made_segment_is_not_attached_and_its_creators_death_frees_it() -> None:
    with Child(stop_before_the_magic) as child:
        name = _name_said_by(child)
        with pytest.raises(SegmentIncompleteError, match="try again while its creator lives"):
            segment.attach(name)
        reclaim_dead()
        assert path_of(name).exists()
        child.kill()
        reclaim_dead()
    assert files_of(name) == []


def stop_before_the_magic() -> None:
    def stop(mapping: mmap.mmap, offset: int) -> None:
        say(next(name for name in files_of(f".{os.getpid()}.") if name.startswith("rp.")))
        listen()

    lock.initialise_mutex = stop
    segment.create(8, 2, 4)


def test_a_creator_that_is_interrupted_anywhere_leaves_nothing() -> None:
    with Child(create_interrupted_everywhere) as child:
        child.wait_for("nothing is left")
        child.succeed()


def create_interrupted_everywhere() -> None:
    owner.this_process()  # what it looks up once, it has looked up
    n = bytecodes_of_create()
    for at in range(1, n - 3, 9):
        with pytest.raises(KeyboardInterrupt), Bytecodes(interrupt_before(at)):
            segment.create(8, 2, 4)
        assert files_of(f".{os.getpid()}.") == [], at
    assert n > 200
    say("nothing is left")
