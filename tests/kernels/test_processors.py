"""How many processors a process has, from the files of control groups of either version."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from llmcompress_kernels import processors


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine of eight processors without a limit; files of its groups go into the folder."""
    monkeypatch.setattr(processors, "ROOT", tmp_path)
    monkeypatch.setattr(processors, "GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name in processors.BINDING:
        monkeypatch.delenv(name, raising=False)
    processors.quota.cache_clear()
    yield tmp_path
    processors.quota.cache_clear()


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text)


def test_without_groups_all_are_had(groups: Path) -> None:
    assert processors.count() == 8


@pytest.mark.parametrize(("value", "expected"), [("true", 8), ("close", 8), ("false", 1), ("FALSE", 1)])
def test_the_place_of_a_bound_thread_is_not_all(
    groups: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_PROC_BIND", value)
    assert processors.count() == expected
    write(groups, own="0::/\n", cpu_dot_max="200000 100000")
    processors.quota.cache_clear()
    assert processors.count() == min(expected, 2)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 8), ("100000 100000", 1), ("250000 100000", 3), ("20000 100000", 1), ("1600000 100000", 8)],
)
def test_version_2(groups: Path, limit: str, expected: int) -> None:
    write(groups, own="0::/\n", cpu_dot_max=limit)
    assert processors.count() == expected


def test_the_least_of_a_group_and_those_above(groups: Path) -> None:
    write(groups, own="0::/slice/pod/box\n")
    write(groups / "slice", cpu_dot_max="200000 100000")
    write(groups / "slice" / "pod" / "box", cpu_dot_max="400000 100000")
    assert processors.count() == 2


@pytest.mark.parametrize(("allowed", "expected"), [("-1", 8), ("300000", 3)])
@pytest.mark.parametrize("path", ["/", "/docker/0123"])
def test_version_1(groups: Path, allowed: str, expected: int, path: str) -> None:
    # within a container the group's name is one of outside, where its folder does not exist
    write(groups, own=f"3:cpuset:/\n2:cpu,cpuacct:{path}\n0::/\n")
    write(groups / "cpu", cpu_dot_cfs_quota_us=allowed, cpu_dot_cfs_period_us="100000")
    assert processors.count() == expected


def test_names_that_lead_outside(groups: Path) -> None:
    write(groups, own="0::/../../elsewhere\n", cpu_dot_max="100000 100000")
    assert processors.count() == 1


def test_names_that_are_no_text(groups: Path) -> None:
    (groups / "own").write_bytes(b"0::/a\xff\n")
    write(groups / os.fsdecode(b"a\xff"), cpu_dot_max="100000 100000")
    assert processors.count() == 1
