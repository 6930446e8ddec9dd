"""Cores a process may use: CPU quotas of its cgroup and its parents, in both cgroup versions."""

import os
from pathlib import Path

import pytest

from turborank.cli import doctor
from turborank.engines import cores
from turborank.engines import torch as torch_engine

V2 = "36 25 0:31 {root} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "36 25 0:31 {root} {point} rw,nosuid - cgroup cgroup rw,cpu,cpuacct"


def tree(root: Path, cgroup: str, mount: str, files: dict[str, str]) -> Path:
    """A file system with /proc/self and the files of cgroups."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(cgroup + "\n")
    (proc / "mountinfo").write_text("22 1 0:5 / /proc rw - proc proc rw\n" + mount + "\n")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": str(quota), f"{folder}/cpu.cfs_period_us": str(period)}


FS = "sys/fs/cgroup"
CASES = {
    "v2, a systemd scope": (
        "0::/user.slice/run.scope", V2.format(root="/", point="/sys/fs/cgroup"),
        {f"{FS}/user.slice/run.scope/cpu.max": "200000 100000", f"{FS}/user.slice/cpu.max": "max 100000"},
        [2.0],
    ),
    "v2, nested: the smallest may be above": (
        "0::/kubepods/pod1/container", V2.format(root="/", point="/sys/fs/cgroup"),
        {
            f"{FS}/kubepods/pod1/container/cpu.max": "400000 100000", f"{FS}/kubepods/pod1/cpu.max": "150000 100000",
            f"{FS}/kubepods/cpu.max": "max 100000",
        },
        [4.0, 1.5],
    ),
    "v2, a container with a namespace of its own": (
        "0::/", V2.format(root="/", point="/sys/fs/cgroup"), {f"{FS}/cpu.max": "50000 100000"}, [0.5],
    ),
    "v2, a container in the host's namespace: what is mounted is its own cgroup": (
        "0::/kubepods/pod1/c2", V2.format(root="/kubepods/pod1/c2", point="/sys/fs/cgroup"),
        {f"{FS}/cpu.max": "300000 100000"}, [3.0],
    ),
    "v2, mounted from above the namespace": (
        "0::/../other", V2.format(root="/..", point="/sys/fs/cgroup"), {f"{FS}/cpu.max": "100000 100000"}, [1.0],
    ),
    "v1, docker": (
        "9:pids:/x\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc",
        V1.format(root="/", point="/sys/fs/cgroup/cpu,cpuacct"),
        v1(f"{FS}/cpu,cpuacct/docker/abc", 250_000) | v1(f"{FS}/cpu,cpuacct", -1), [2.5],
    ),
    "v1, inside a container": (
        "4:cpuacct,cpu:/docker/abc", V1.format(root="/docker/abc", point="/sys/fs/cgroup/cpu"),
        v1(f"{FS}/cpu", 60_000, 20_000), [3.0],
    ),
    "v1 beside an empty v2": (
        "4:cpu:/a/b\n0::/a/b", V1.format(root="/", point="/cg") + "\n" + V2.format(root="/", point="/cg/unified"),
        v1("cg/a", 100_000) | v1("cg/a/b", 800_000), [8.0, 1.0],
    ),
    "a blank in the mount point": (
        "0::/job", V2.format(root="/", point="/my\\040cgroups"), {"my cgroups/job/cpu.max": "200000 100000"}, [2.0],
    ),
    "no quota": ("0::/a", V2.format(root="/", point="/sys/fs/cgroup"), {f"{FS}/a/cpu.max": "max 100000"}, []),
    "not what Linux writes": ("0::/a", V2.format(root="/", point="/sys/fs/cgroup"), {f"{FS}/a/cpu.max": "2"}, []),
    "no cgroups": ("", "", {}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_quotas_of_the_cgroup_and_of_those_above(case: str, tmp_path: Path) -> None:
    cgroup, mount, files, expected = CASES[case]
    found = cores.quotas(tree(tmp_path, cgroup, mount, files))
    assert [limit.cores for limit in found] == expected
    for limit in found:
        assert str(tmp_path) in limit.source


def test_no_proc_is_no_quota(tmp_path: Path) -> None:
    assert cores.quotas(tmp_path) == []


@pytest.mark.parametrize(
    ("limits", "threads"), [([8], 8), ([8, 2.0], 2), ([8, 1.5, 4], 2), ([8, 0.2], 1), ([1, 4.0], 1), ([8, 3.0, 2.0], 2)]
)
def test_the_smallest_counts_rounded_up(limits: list[float], threads: int) -> None:
    assert cores.allowed([cores.CoreLimit(limit, "") for limit in limits]) == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_the_affinity_mask_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores.limits()[0] == (1, "affinity mask")
        assert cores.allowed() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_torch_gets_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    monkeypatch.setattr(cores, "limits", lambda: [cores.CoreLimit(1.0, "")])
    try:
        torch.set_num_threads(2)
        torch_engine.limit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_doctor_says_where_each_number_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [cores.CoreLimit(8, "affinity mask"), cores.CoreLimit(1.5, "cgroup v2 quota of /x/y")]
    monkeypatch.setattr(cores, "limits", lambda: found)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    told = {finding.what: finding.value for finding in doctor.machine() if finding.what}
    assert told["cores"] == f"2 of {os.cpu_count()} may be used"
    assert "TOKENIZERS_PARALLELISM=true" in told["tokenizer threads"]
    assert told["torch threads"] == "3 by OMP_NUM_THREADS"
    sources = [finding.value for finding in doctor.machine() if not finding.what]
    assert sources == ["8 by the affinity mask", "1.5 by the cgroup v2 quota of /x/y"]
