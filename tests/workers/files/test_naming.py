"""Names of staged files."""

from __future__ import annotations

import pytest

from ringpool.workers.files.naming import is_staging_name, random_token, staging_name

TOKEN = "0123456789abcdef-1f-2"


@pytest.mark.parametrize(
    ("target", "suffixes"),
    [
        (b"a.txt", b".txt"),
        (b"archive.tar.gz", b".tar.gz"),
        (b"plain", b""),
        (b".profile", b""),
        (b".hidden.json", b".json"),
        (b"..twice.json", b".json"),
        (b"end.", b""),
        (b"v1." + b"long words " * 5 + b".jpg", b".jpg"),
        (b"x." + b"s" * 31, b"." + b"s" * 31),
        (b"x." + b"s" * 32, b""),
        (b"caf\xe9.\xff", b".\xff"),
        (b"line\nbreak.a\nb", b".a\nb"),
    ],
)
def test_a_staged_file_keeps_the_suffixes_that_fit(target: bytes, suffixes: bytes) -> None:
    name = staging_name(target, TOKEN)
    assert name == b".rp-" + TOKEN.encode() + suffixes
    assert is_staging_name(name)


def test_a_staged_file_stands_in_the_targets_directory() -> None:
    assert staging_name(b"/out/x.y/a.txt", TOKEN) == b"/out/x.y/.rp-" + TOKEN.encode() + b".txt"
    assert staging_name(b"/a.txt", TOKEN).startswith(b"/.rp-")


def test_the_longest_target_and_token_give_a_name_that_a_directory_takes() -> None:
    token = "-".join(("f" * 32, "f" * 16, "f" * 16))
    for target in (b"n" * 255, b"n" * 222 + b"." + b"s" * 31, b"n" * 251 + b".txt"):
        assert len(staging_name(target, token)) <= 255


def test_two_suffixes_of_one_stem_never_share_a_staged_file() -> None:
    token = random_token()
    assert staging_name(b"a.txt", token) != staging_name(b"a.csv", token)
    assert random_token() != random_token()


@pytest.mark.parametrize(
    "token", ["", "short", "0123456789ABCDEF", "0123456789abcdef-", "0123456789abcdef/1", "../a" * 8]
)
def test_a_token_that_could_not_be_recognised_is_refused(token: str) -> None:
    with pytest.raises(AssertionError):
        staging_name(b"a.txt", token)


@pytest.mark.parametrize(
    "name",
    [
        b"a.txt",
        b".rp-",
        b".rp-notes.txt",
        b".rp-0123456789abcdefx",
        b".rp-0123456789abcdef/x.y",
        b"x.rp-0123456789abcdef",
    ],
)
def test_a_users_own_name_is_no_staging_name(name: bytes) -> None:
    assert not is_staging_name(name)
