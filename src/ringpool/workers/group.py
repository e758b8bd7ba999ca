"""What the tasks of one worker have staged, until it is put in its place, together.

    before_task --> run, stage --> add --> ... --> commit: Staging.commit -> each task's result

While user code runs, nobody commits. So this is done when a claim ends; before any task is started, unless recent ones
took under 5 ms; and when as much is staged as a claim can hold. A death in between loses nothing: whoever comes
finishes what is STAGED (``coordinator.estate``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringpool.shm import blobs, layout

if TYPE_CHECKING:
    from ringpool.workers.confinement import Confinement
    from ringpool.workers.files.durability import Durability
    from ringpool.workers.groupcommit import StagedTask, Staging
    from ringpool.workers.posting import Post

TASKS_MAX = layout.CLAIMS_MAX
SHORT_NS = 5_000_000  # a task that may take longer is not begun while others are staged


class Group:
    """What one worker has staged. ``post``: how the results of its tasks are posted."""

    def __init__(self, post: Post, confinement: Confinement) -> None:
        self._post = post
        self._confinement = confinement
        self._tasks: list[StagedTask] = []
        self._staging: Staging | None = None
        self._durability: Durability | None = None
        self._new_directories: list[bytes] = []
        self._mean_ns = 0.0

    def __bool__(self) -> bool:
        """Whether something is to be committed."""
        return bool(self._tasks)

    def before_task(self) -> None:
        """A task is about to be started: what is staged does not wait for a long one."""
        if self._tasks and (self._mean_ns > SHORT_NS or len(self._tasks) >= TASKS_MAX):
            self.commit()

    def observe(self, spent_ns: int) -> None:
        """A task has taken so long."""
        self._mean_ns += (spent_ns - self._mean_ns) / 4

    def add(
        self, task: StagedTask, staging: Staging, durability: Durability, new_directories: list[bytes] | None = None
    ) -> None:
        """``task`` is STAGED, by ``staging``. ``new_directories``: of targets, whose own entries may not be on disk
        yet; it is emptied when they are.
        """
        if self._tasks and staging is not self._staging:
            self.commit()
        self._tasks.append(task)
        self._staging, self._durability = staging, durability
        self._new_directories = [] if new_directories is None else new_directories

    def commit(self) -> None:
        """Put what is staged in its place, and post it."""
        if not self._tasks:
            return
        self._confinement.disarm()  # what a task's timer raises is not to come into what is others' too
        self._confinement.end_if_exhausted()
        tasks, self._tasks = self._tasks, []
        assert self._staging is not None
        assert self._durability is not None
        self._staging.commit(tasks, self._durability, self._new_directories)
        self._new_directories.clear()
        results = self._post.results
        for task in tasks:
            if task.error is None:
                results.finish(task.entry)
            else:
                results.retract(task.entry)
                blobs.unlink(self._post.blob(task.entry))  # its name is the error's now
                self._post.error(task.entry, task.error, 0)
