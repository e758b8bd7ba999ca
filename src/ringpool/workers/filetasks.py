"""File tasks, in a worker: resolve the function, run it, commit its output.

without an output   call -> post
with one            call(src, staged) -> stage: COMMITTING -> rename, under the target's lock -> OK
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from ringpool.shm import blobs, layout
from ringpool.shm.segment import Segment
from ringpool.workers import tasks, values
from ringpool.workers.confinement import Confinement
from ringpool.workers.files import naming, output
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.locks import call_locked
from ringpool.workers.posting import Post

FUNCTIONS_MAX = 32  # bound at a time, with their parameters


class BoundFunction(msgspec.Struct, frozen=True):
    """A task function, resolved, with what its tasks share."""

    call: tasks.TaskFunction
    source_type: Callable[[bytes], Any]
    target_type: Callable[[bytes], Any]
    parameters: dict[str, Any]
    durability: Durability


class FileRunner:
    """Runs the file tasks of one worker."""

    def __init__(self, segment: Segment, post: Post, confinement: Confinement) -> None:
        self._segment = segment.name
        self._token = segment.header.uuid.hex()[:16]
        self._post = post
        self._confinement = confinement
        self._functions: dict[int, BoundFunction] = {}

    def run(self, entry: int, function_id: int, payload: bytes, blob: int, start_ns: int) -> int:
        """Run the task of ``entry`` and post its result: of whatever kind, one is posted. When that was done, ns."""
        try:
            function = self._functions.get(function_id)
            if function is None:
                function = self._bind(function_id)
                start_ns = time.monotonic_ns()  # what importing it took is no task's
            body: bytes | memoryview = payload
            if blob:
                _, body, _ = blobs.read(blobs.payload_name(self._segment, blob))
            task = tasks.decode_payload(body)
            parameters = function.parameters
            if task.parameters is not None:
                parameters = {**parameters, **tasks.unpack_parameters(task.parameters)}
            if task.target is None:
                value = function.call(function.source_type(task.source), **parameters)
                end_ns = time.monotonic_ns()
                self._post.value(entry, value, end_ns - start_ns)
            else:
                end_ns = self._run_with_output(entry, function, task, parameters, start_ns)
        except BaseException as error:  # a task may raise what it likes, SystemExit and KeyboardInterrupt too
            end_ns = time.monotonic_ns()
            self._post.error(entry, error, end_ns - start_ns)
        return end_ns

    def caller(self, function_id: int) -> Callable[[bytes], Any]:
        """What is to be called with the path of each file of a vector. Raises ``UnknownFunctionError``, and what
        unpickling the parameters raises.
        """
        function = self._functions.get(function_id) or self._bind(function_id)
        call, source_type, parameters = function.call, function.source_type, function.parameters
        return lambda path: call(source_type(path), **parameters)

    def _bind(self, function_id: int) -> BoundFunction:
        _, body, _ = blobs.read(blobs.function_name(self._segment, function_id))
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
        while len(self._functions) >= FUNCTIONS_MAX:
            del self._functions[next(iter(self._functions))]
        self._functions[function_id] = bound
        return bound

    def _run_with_output(
        self, entry: int, function: BoundFunction, task: tasks.FilePayload, parameters: dict[str, Any], start_ns: int
    ) -> int:
        """Run, stage, and under the target's lock: COMMITTING, rename, OK. A death leaves all or nothing."""
        assert task.target is not None
        post, results = self._post, self._post.results
        target = output.prepare_target(task.target, function.durability)
        staged = staged_path(self._token, entry, target)
        try:
            value = function.call(function.source_type(task.source), function.target_type(staged), **parameters)
            encoded = values.encode_result(value)
            file = output.finish_staged(staged, target, function.durability)
            end_ns = time.monotonic_ns()
            self._confinement.end_if_forked()
            body, encoding, blob_bytes = post.place(entry, encoded)

            def commit() -> None:
                results.stage(entry, encoding, body, end_ns - start_ns, blob_bytes, file.dev, file.ino)
                output.publish_staged(staged, target, function.durability, is_linked=file.n_links > 1)
                results.finish(entry)

            call_locked(target, None, commit)
        except BaseException:
            self._confinement.end_if_forked()
            output.discard_staged(staged)
            blobs.unlink(post.blob(entry))  # its name is the error's now
            raise
        return end_ns


def staged_path(token: str, entry: int, target: bytes) -> bytes:
    """Where an attempt writes its output until it commits: the coordinator finds it by the same name after a death."""
    return naming.staging_name(target, f"{token}-{layout.sequence_of(entry)}-{layout.attempt_of(entry)}")
