"""The ground floor: bytes in shared memory. It knows no task function, no file and no process policy."""
