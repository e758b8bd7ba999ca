from typing import Any

class ParallelBackendBase:
    nesting_level: int | None
    inner_max_num_threads: int | None
    backend_kwargs: dict[str, Any]
    parallel: Any
    def __init__(
        self, nesting_level: int | None = ..., inner_max_num_threads: int | None = ..., **backend_kwargs: Any
    ) -> None: ...
    def _prepare_worker_env(self, n_jobs: int) -> dict[str, str]: ...

class AutoBatchingMixin:
    def reset_batch_stats(self) -> None: ...

class SequentialBackend(ParallelBackendBase): ...

class FallbackToBackend(Exception):  # noqa: N818  (its name)
    def __init__(self, backend: ParallelBackendBase) -> None: ...
