"""Who lives: pid and start time together, and a zombie is dead."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from tests.workers.files.child import Child, listen, say

from ringpool.shm import owner
from ringpool.shm.owner import Owner

_PR_SET_NAME = 15


def test_who_cannot_be_looked_at_counts_as_alive(
    no_descriptors: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    with no_descriptors():
        assert Owner(os.getppid(), 1).alive
        assert not Owner(os.getppid(), 0).alive
        with pytest.raises(OSError, match="Too many open files"):
            owner.this_process()


def until(condition: Callable[[], object]) -> None:
    """Wait for ``condition``, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.001)


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def live_on() -> None:
    say("alive")
    listen()


def live_on_as(name: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    live_on()


def test_this_process_lives() -> None:
    me = owner.this_process()
    assert me.pid == os.getpid()
    assert me.start > 0
    assert me.alive
    assert owner.this_process() == me


def test_a_process_lives_until_it_is_killed() -> None:
    with Child(live_on) as child:
        child.wait_for("alive")
        it = Owner(child.pid, owner.start_time(child.pid))
        assert it.alive
        child.kill()
        assert not it.alive
        assert owner.start_time(child.pid) == 0


def test_a_stopped_process_lives() -> None:
    with Child(live_on) as child:
        child.wait_for("alive")
        it = Owner(child.pid, owner.start_time(child.pid))
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: state_of(child.pid) == "T")
        assert it.alive


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    it = Owner(child.pid, owner.start_time(child.pid))
    try:
        assert it.alive
        child.kill()
        until(lambda: state_of(child.pid) == "Z")  # nobody has waited for it: the pid still stands
        assert os.path.exists(f"/proc/{child.pid}")
        assert not it.alive
        assert owner.start_time(child.pid) == 0
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait()


def test_another_process_with_the_same_pid_is_not_the_owner() -> None:
    me = owner.this_process()
    assert not Owner(me.pid, me.start - 1).alive
    assert not Owner(me.pid, me.start + 1).alive


@pytest.mark.parametrize("pid", [0, 1 << 22, (1 << 64) - 1])
def test_a_pid_that_there_is_not_is_dead(pid: int) -> None:
    assert owner.start_time(pid) == 0
    assert not Owner(pid, 1).alive


def test_a_start_of_zero_is_nobody() -> None:
    assert not Owner(0, 0).alive
    assert not Owner(os.getpid(), 0).alive


@pytest.mark.parametrize("name", [") Z 1 (", "a b c", "))))", "(", ") X", "1 2 3 4"])
def test_a_command_name_does_not_confuse_the_start_time(name: str) -> None:
    with Child(live_on_as, name) as child:
        child.wait_for("alive")
        with open(f"/proc/{child.pid}/comm", encoding="ascii") as comm:
            assert comm.read() == f"{name}\n"
        before = owner.this_process().start
        assert before <= owner.start_time(child.pid)
        assert Owner(child.pid, owner.start_time(child.pid)).alive


def test_the_start_time_is_in_ticks_since_boot() -> None:
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    assert 0 < owner.this_process().start / ticks_per_s <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_the_boot_has_16_bytes_that_stay() -> None:
    assert len(owner.boot_id()) == 16
    assert owner.boot_id() == owner.boot_id()
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as text:
        assert owner.boot_id().hex() == text.read().strip().replace("-", "")


def test_the_pid_namespace_is_that_of_this_process() -> None:
    link = re.fullmatch(r"pid:\[(\d+)\]", os.readlink("/proc/self/ns/pid"))
    assert link is not None
    assert owner.pid_namespace() == int(link[1])


def test_a_fork_is_counted_whatever_its_pid_is() -> None:
    before = owner.forks()
    pid = os.fork()
    if not pid:
        os._exit(owner.forks() - before)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert owner.forks() == before


def test_a_process_is_the_same_one_for_those_in_another_time_namespace() -> None:
    me = owner.this_process()
    program = f"from ringpool.shm.owner import Owner; print(Owner({me.pid}, {me.start}).alive)"
    command = ["unshare", "--time", "--boottime", "100000", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no other time namespace: {done.stderr.strip()}")
    assert done.stdout == "True\n"
