"""Engines: other people's ways of handing out tasks, with ringpool's workers under them.

register_joblib_backend    joblib.Parallel(backend="ringpool"), and with it scikit-learn      joblib.py
"""

from __future__ import annotations


def register_joblib_backend() -> None:
    """From now on joblib knows the backend ``"ringpool"``: ``joblib.Parallel(n_jobs=2, backend="ringpool")``.

    ``joblib.parallel_config(backend="ringpool", ...)`` takes the keywords of ``RingPoolExecutor`` besides joblib's own:
    ``memory_limit=``, ``initializer=`` and so on. Raises ``ImportError`` where joblib is missing, or older than 1.5.
    """
    try:
        from ringpool.coordinator.engines import joblib
    except ImportError as error:
        if not (error.name or "").startswith("joblib"):
            raise
        raise ImportError(
            "the backend for joblib needs joblib 1.5 or newer: pip install 'ringpool[joblib]'", name=error.name
        ) from error
    joblib.register()
