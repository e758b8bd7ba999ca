"""New outputs of a job have what the kernel gives to files that are made in their directories."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ringpool import Job

GROUP = 12345
# user::rw- user:1000:rw- group::r-- mask::rw- other::---, as acl(5) and linux/posix_acl_xattr.h lay it out
FOR_USER_1000 = bytes.fromhex(
    "02000000 01000600ffffffff 02000600e8030000 04000400ffffffff 10000600ffffffff 20000000ffffffff"
)
FOR_USER_2000 = FOR_USER_1000.replace(bytes.fromhex("e8030000"), bytes.fromhex("d0070000"))
DEFAULT, ACCESS = "system.posix_acl_default", "system.posix_acl_access"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("in/shared/a", "in/b", "out/shared/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def run(command: str) -> None:
    report = Job(command=command, inputs="in", output="out/{relpath}").run(1)
    assert (report.ok, report.progress.done) == (True, 2)


@as_root
@pytest.mark.parametrize("shared", ["out/shared", "out"])
def test_a_new_output_has_the_group_of_a_setgid_directory(place: Path, shared: str) -> None:
    os.chown(place / shared, -1, GROUP)
    (place / shared).chmod(0o2775)
    run("cp {src} {dst}")
    groups = {name: os.stat(place / "out" / name).st_gid for name in ("shared/a", "b")}
    made = {name: Path(place, "out", name).with_suffix(".made") for name in groups}
    for path in made.values():
        path.touch()
    assert groups == {name: os.stat(path).st_gid for name, path in made.items()}
    assert GROUP in groups.values()


def test_a_new_output_has_the_default_acl_of_its_directory_but_not_where_its_mode_was_chosen(place: Path) -> None:
    try:
        os.setxattr(place / "out/shared", DEFAULT, FOR_USER_1000)
    except OSError:
        pytest.skip("this file system has no ACLs")
    run("cp {src} {dst}")
    path = place / "out/shared/a"
    (place / "out/shared/made").touch()
    assert os.getxattr(path, ACCESS) == os.getxattr(place / "out/shared/made", ACCESS)
    assert os.stat(path).st_mode == os.stat(place / "out/shared/made").st_mode
    assert ACCESS not in os.listxattr(place / "out/b")
    path.unlink()
    (place / "out/b").unlink()
    run("cp {src} {dst}; chmod 600 {dst}")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert ACCESS not in os.listxattr(path)


@pytest.mark.parametrize("own", [None, FOR_USER_2000])
def test_a_new_output_has_nothing_of_the_default_acl_of_the_jobs_directory(place: Path, own: bytes | None) -> None:
    try:
        os.setxattr(place / "out", DEFAULT, FOR_USER_1000)
        if own is not None:
            os.setxattr(place / "out/shared", DEFAULT, own)
    except OSError:
        pytest.skip("this file system has no ACLs")
    run("cp {src} {dst}")
    for directory in ("out/shared", "out"):
        (place / directory / "made").touch()
    for output, made in (("out/shared/a", "out/shared/made"), ("out/b", "out/made")):
        found = [
            os.getxattr(place / each, ACCESS) if ACCESS in os.listxattr(place / each) else b""
            for each in (output, made)
        ]
        assert found[0] == found[1]
        assert os.stat(place / output).st_mode == os.stat(place / made).st_mode


@as_root
@pytest.mark.parametrize("which", [".ringpool", ".ringpool/staging"])
def test_no_job_stages_where_another_user_could_change_it(place: Path, which: str) -> None:
    (place / "out/.ringpool/staging").mkdir(parents=True)
    os.chown(place / "out" / which, GROUP, GROUP)
    (place / "out").chmod(0o1777)
    with pytest.raises(PermissionError, match="is another user's, who could change what is staged there"):
        Job(command="cp {src} {dst}", inputs="in", output="out/{relpath}").run(1)
    os.chown(place / "out", GROUP, GROUP)
    run("cp {src} {dst}")


@as_root
def test_a_group_and_set_id_bits_that_the_task_has_chosen_stay(place: Path) -> None:
    os.chown(place / "out/shared", -1, GROUP)
    (place / "out/shared").chmod(0o2775)
    run("cp {src} {dst}; chgrp 2345 {dst}; chmod 2750 {dst}")
    found = os.stat(place / "out/shared/a")
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (2345, 0o2750)
    (place / "out/shared/a").unlink()
    (place / "out/b").unlink()
    run("cp {src} {dst}; chmod 2750 {dst}")
    found = os.stat(place / "out/shared/a")
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (GROUP, 0o2750)
