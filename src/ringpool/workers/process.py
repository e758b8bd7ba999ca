"""A worker process: attach, claim, run, commit, post.

    main -> Confinement -> attach -> WorkerEnd -> loop:

        claim ----> for each entry: start -> run -> post -> restore ----> adapt the batch -> claim ...
          |                           |                        |
          +- None: stop, exit 0       +- False: taken back,    +- no: exit UNSOUND; finished ones are settled,
                                         claim again              unstarted ones go back, nobody is blamed

Crash-only: whatever goes wrong outside a task function ends the process at once (``os._exit``), without unlocking or
tidying. That path has to be right anyway, because SIGKILL takes it; so there is no other.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from ringpool.errors import RingpoolError
from ringpool.shm import blobs, layout, segment
from ringpool.shm.claims import WorkerEnd
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import Results
from ringpool.workers import tasks, values
from ringpool.workers.confinement import Confinement, name_process
from ringpool.workers.files import naming, output
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.locks import PathLock

EXIT_ORPHAN = 69  # the coordinator was gone before this process was bound to it
EXIT_UNSOUND = 70  # a task closed descriptors that this process needs
EXIT_BROKEN = 71  # an error outside a task function; standard error says which
CLAIM_TARGET_NS = 200_000  # a claim holds about this much work: what a neighbour may have to wait
FUNCTIONS_MAX = 32  # bound at a time, with their parameters

_OK, _ERROR, _CANCELLED = int(Status.OK), int(Status.ERROR), int(Status.CANCELLED)
_MSGPACK, _BLOB = int(Encoding.MSGPACK), int(Encoding.BLOB)


class WorkerArguments(msgspec.Struct, frozen=True):
    """What the coordinator tells a worker: segment, index, most entries per claim, spins before sleeping."""

    segment: str
    index: int
    batch_max: int
    spins: int


def main(arguments: WorkerArguments, guard: Connection) -> None:
    """The body of a worker process. Returns only when told to stop."""
    code = EXIT_BROKEN
    try:
        worker = Worker(arguments, Confinement(os.dup(guard.fileno())))
        guard.close()
        name_process(f"ringpool-w{arguments.index}")  # from now on it is one
        code = worker.run()
    except ProcessLookupError:
        code = EXIT_ORPHAN
    except BaseException:
        os.write(2, f"ringpool: worker {arguments.index} ({os.getpid()}) ends:\n{traceback.format_exc()}".encode())
    if code:
        _flush()
        os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # closed by a task: nothing to flush
            continue


class BoundFunction(msgspec.Struct, frozen=True):
    """A task function, resolved, with what its tasks share."""

    call: tasks.TaskFunction
    source_type: Callable[[bytes], Any]
    target_type: Callable[[bytes], Any]
    parameters: dict[str, Any]
    durability: Durability


class Worker:
    """The loop of one worker process. ``ringpool.shm`` keeps it safe; this decides what a task is."""

    def __init__(self, arguments: WorkerArguments, confinement: Confinement) -> None:
        self.confinement = confinement
        self.segment = segment.attach(arguments.segment)
        self.token = self.segment.header.uuid.hex()[:16]
        self.end = WorkerEnd(self.segment, arguments.index, arguments.spins)
        self.results = Results(self.end.ring, arguments.index)
        self.batch_max = min(arguments.batch_max, self.end.ring.claims_max) if self.end.can_be_revoked else 1
        self.functions: dict[int, BoundFunction] = {}
        self.n_tasks = self.n_errors = self.busy_ns = 0

    def run(self) -> int:
        """Until told to stop; the exit status."""
        claim, start, restore = self.end.claim, self.end.start, self.confinement.restore
        clock, run_task = time.monotonic_ns, self.run_task
        mean_ns, batch = float(CLAIM_TARGET_NS), 1
        while True:
            entries = claim(batch)
            if entries is None:
                return 0
            began_ns = now_ns = clock()
            n = 0
            for entry in entries:
                if not start(entry, now_ns):
                    break
                now_ns = run_task(entry, now_ns)
                n += 1
                if not restore():
                    return EXIT_UNSOUND
            if not n:
                continue
            self.confinement.disarm()
            self.n_tasks += n
            self.busy_ns += now_ns - began_ns
            self.end.count(self.n_tasks, self.n_errors, self.busy_ns)
            mean_ns += ((now_ns - began_ns) / n - mean_ns) / 4
            batch = max(1, min(self.batch_max, int(CLAIM_TARGET_NS / (mean_ns + 1))))

    def run_task(self, entry: int, start_ns: int) -> int:
        """Run the task of ``entry`` and post its result: of whatever kind, one is posted. When that was done, ns."""
        function_id, payload, blob, _, cancelled = self.results.read_task(entry)
        if cancelled:
            self.results.post(entry, _CANCELLED, 0, b"", 0)
            return start_ns
        try:
            function = self.functions.get(function_id) or self._bind(function_id)
            if blob:
                _, payload, _ = blobs.read(blobs.payload_name(self.segment.name, blob))
            task = tasks.decode_payload(payload)
            parameters = function.parameters
            if task.parameters is not None:
                parameters = {**parameters, **tasks.unpack_parameters(task.parameters)}
            if task.target is None:
                value = function.call(function.source_type(task.source), **parameters)
                end_ns = time.monotonic_ns()
                body = values.encode_inline(value)
                if body is None:
                    self._post(entry, _OK, values.encode_result(value), end_ns - start_ns)
                else:
                    if self.confinement.forked:
                        self.confinement.end_if_forked()
                    self.results.post(entry, _OK, _MSGPACK, body, end_ns - start_ns)
            else:
                end_ns = self._run_with_output(entry, function, task, parameters, start_ns)
        except BaseException as error:  # a task may raise what it likes, SystemExit and KeyboardInterrupt too
            end_ns = time.monotonic_ns()
            self._post_error(entry, error, end_ns - start_ns)
        return end_ns

    def _bind(self, function_id: int) -> BoundFunction:
        _, body, _ = blobs.read(blobs.function_name(self.segment.name, function_id))
        spec = tasks.decode_spec(body)
        call = tasks.resolve(spec.name)
        signature = tasks.signature_of(call, spec.name)
        bound = BoundFunction(
            tasks.with_retries(call, spec.retry),
            signature.source_type,
            signature.target_type,
            tasks.unpack_parameters(spec.parameters),
            Durability(spec.durability),
        )
        while len(self.functions) >= FUNCTIONS_MAX:
            del self.functions[next(iter(self.functions))]
        self.functions[function_id] = bound
        return bound

    def _run_with_output(
        self, entry: int, function: BoundFunction, task: tasks.FilePayload, parameters: dict[str, Any], start_ns: int
    ) -> int:
        """Run, stage, and under the target's lock: COMMITTING, rename, OK. A death leaves all or nothing."""
        assert task.target is not None
        target = output.prepare_target(task.target, function.durability)
        staged = staged_path(self.token, entry, target)
        try:
            value = function.call(function.source_type(task.source), function.target_type(staged), **parameters)
            encoded = values.encode_result(value)
            file = output.finish_staged(staged, target, function.durability)
            end_ns = time.monotonic_ns()
            self.confinement.end_if_forked()
            body, encoding, blob_bytes = self._place(entry, encoded)
            with PathLock(os.fsdecode(target)):
                self.results.stage(entry, encoding, body, end_ns - start_ns, blob_bytes, file.dev, file.ino)
                output.publish_staged(staged, target, function.durability)
                self.results.finish(entry)
        except BaseException:
            self.confinement.end_if_forked()
            output.discard_staged(staged)
            blobs.unlink(self._result_blob(entry))  # its name is the error's now
            raise
        return end_ns

    def _place(self, entry: int, encoded: values.Encoded) -> tuple[bytes, int, int]:
        """Where an encoded value goes: inline bytes, encoding and blob size. Writes the blob if it takes one."""
        if encoded.fits_record:
            return encoded.body, encoded.encoding, 0
        return b"", _BLOB, values.write_blob(self._result_blob(entry), encoded)

    def _result_blob(self, entry: int) -> str:
        return blobs.result_name(self.segment.name, layout.sequence_of(entry), layout.attempt_of(entry))

    def _post(self, entry: int, status: int, encoded: values.Encoded, spent_ns: int) -> None:
        self.confinement.end_if_forked()
        body, encoding, blob_bytes = self._place(entry, encoded)
        self.results.post(entry, status, encoding, body, spent_ns, blob_bytes)

    def _post_error(self, entry: int, error: BaseException, spent_ns: int) -> None:
        self.n_errors += 1
        try:
            self._post(entry, _ERROR, values.encode_error(error), spent_ns)
        except (RingpoolError, OSError):  # no room for it in shared memory: its first words fit the record
            words = f"{type(error).__qualname__}: {error}".encode(errors="replace")[: layout.INLINE_BYTES - 8]
            self._post(entry, _ERROR, values.encode(words.decode(errors="ignore")), spent_ns)


def staged_path(token: str, entry: int, target: bytes) -> bytes:
    """Where an attempt writes its output until it commits: the coordinator finds it by the same name after a death."""
    return naming.staging_name(target, f"{token}-{layout.sequence_of(entry)}-{layout.attempt_of(entry)}")
