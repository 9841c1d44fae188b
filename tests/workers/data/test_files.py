"""Paths, package: paths and content digests."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from ringworld_workers.data.files import DataError, file_digest, resolve


def test_relative_patterns_are_sorted_and_labelled_without_machine_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [f.label for f in resolve("*.txt", tmp_path)] == ["a.txt", "b.txt"]
    assert [f.label for f in resolve("**/*.txt", tmp_path)] == ["a.txt", "b.txt", "deep/c.txt"]
    assert resolve("deep/c.txt", tmp_path)[0].path.read_text() == "deep/c.txt"


def test_a_package_is_looked_up_but_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "ringworld_fixture_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "one.txt").write_text("1")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (file,) = resolve("package:ringworld_fixture_package/*.txt", tmp_path)
    assert file.label == "package:ringworld_fixture_package/one.txt"
    assert file.path.read_text() == "1"
    assert "ringworld_fixture_package" not in sys.modules


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("package:no_such_package_here/x.txt", r"pip install 'ringworld\[quickstart\]'"),
        ("package:no-slash", "package:NAME/path"),
        ("missing-*.txt", "matches no file"),
    ],
)
def test_what_is_not_there_is_named_with_the_remedy(
    tmp_path: Path, pattern: str, says: str
) -> None:
    with pytest.raises(DataError, match=says) as raised:
        resolve(pattern, tmp_path)
    assert pattern in str(raised.value)


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"ring" * 100_000)
    assert file_digest(path) == hashlib.sha256(b"ring" * 100_000).hexdigest()
