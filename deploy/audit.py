"""`make audit`: known vulnerabilities of what an installation brings, and its bill of materials.

    python deploy/audit.py [FOLDER] [SECONDS]      default: .venv-audit, 900 seconds for all steps together

pip-audit reports "no known vulnerabilities" also where its database could not be asked about a package. This program
counts such packages and fails. Exit code 0: every package was checked and none has a known vulnerability; 1: one has;
3: not everything was checked, and the output says what was not and why.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path
from typing import Any

EXTRAS = ("serve", "eval", "onnx")
TOOLS = ("pip-audit==2.*", "cyclonedx-bom==7.*")
SERVICES = ("pypi", "osv")  # the second is asked where the first does not know all packages
SOCKET_SECONDS = "10"
BILL = Path("dist/sbom.json")
UNCHECKED = 3


class UnfinishedError(Exception):
    """A step that failed or took too long."""


class Steps:
    """Commands that share one limit of time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def run(self, what: str, *words: str | Path, vulnerable: bool = False) -> str:
        """Standard output of a command. Raises UnfinishedError with its last lines.

        ``vulnerable``: exit code 1 with output is success, as pip-audit ends after a finding.
        """
        print(f"audit: {what}", flush=True)
        left = max(0.1, self.end - time.monotonic())
        try:
            done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired as error:
            raise UnfinishedError(f"{what}: not done {self.seconds:.0f} s after the start") from error
        if done.returncode and not (vulnerable and done.returncode == 1 and done.stdout.strip()):
            lines = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise UnfinishedError("\n  ".join([f"{what}: ended with {done.returncode}", *lines]))
        return done.stdout


def requirements() -> list[str]:
    """What an installation with EXTRAS asks for."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(one for name in EXTRAS for one in project["optional-dependencies"][name])]


def install(steps: Steps, folder: Path) -> tuple[Path, Path]:
    """The Pythons of two environments: of the tools, and of what is looked at."""
    tools, installed = folder / "tools", folder / "installed"
    for path, pip in ((tools, True), (installed, False)):
        if not (path / "bin" / "python").exists():
            venv.create(path, with_pip=pip)
    python, other = tools / "bin" / "python", installed / "bin" / "python"
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
    steps.run("installing pip-audit and cyclonedx-bom", *pip, "install", *TOOLS)
    what = f"installing the dependencies with the extras {', '.join(EXTRAS)}"
    steps.run(what, *pip, "--python", other, "install", *requirements())
    return python, other


def write_bill(steps: Steps, tools: Path, installed: Path) -> int:
    """Write the bill of materials; the number of its components."""
    BILL.parent.mkdir(exist_ok=True)
    steps.run(
        f"writing {BILL}", tools.with_name("cyclonedx-py"), "environment", "--pyproject", "pyproject.toml",
        "--mc-type", "library", "--output-reproducible", "--output-format", "JSON", "--output-file", BILL, installed,
    )  # fmt: skip
    return len(json.loads(BILL.read_bytes()).get("components", []))


def ask(steps: Steps, tools: Path, installed: Path, service: str) -> list[dict[str, Any]]:
    """pip-audit's finding for each package."""
    where = steps.run(
        "reading the environment", installed, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    )
    found = steps.run(
        f"asking {service} about known vulnerabilities", tools.with_name("pip-audit"), "--progress-spinner", "off",
        "--timeout", SOCKET_SECONDS, "--vulnerability-service", service, "--format", "json", "--path", where.strip(),
        vulnerable=True,
    )  # fmt: skip
    try:
        dependencies: list[dict[str, Any]] = json.loads(found)["dependencies"]
    except ValueError as error:
        raise UnfinishedError(f"asking {service}: no answer in JSON") from error
    return dependencies


def check(steps: Steps, tools: Path, installed: Path) -> int:
    """Ask one service after the other until every package is checked; print the findings; the exit code."""
    checked: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for service in SERVICES:
        try:
            found = ask(steps, tools, installed, service)
        except UnfinishedError as error:
            print(f"audit: {error}")
            continue
        checked |= {one["name"]: one for one in found if "skip_reason" not in one and one["name"] not in checked}
        missing = {one["name"]: one.get("skip_reason", "") for one in found if one["name"] not in checked}
        print(f"audit: {service} knew {len(found) - len(missing)} of {len(found)} packages")
        if found and not missing:
            break
    for one in checked.values():
        for fault in one["vulns"]:
            fixed = ", ".join(fault["fix_versions"]) or "no version"
            print(f"audit: {one['name']} {one['version']}: {fault['id']}, fixed in {fixed}")
    for name, reason in missing.items():
        print(f"audit: NOT CHECKED: {name}: {reason}")
    bad = sum(bool(one["vulns"]) for one in checked.values())
    print(f"audit: {len(checked)} packages checked, {bad} with known vulnerabilities, {len(missing)} not checked")
    if not checked:
        print("audit: NOTHING WAS CHECKED: no database could be reached")
    return 1 if bad else UNCHECKED if missing or not checked else 0


def main() -> int:
    folder, seconds = Path(".venv-audit"), 900.0
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        seconds = float(sys.argv[2])
    steps = Steps(seconds)
    try:
        tools, installed = install(steps, folder.absolute())
        print(f"audit: {BILL} has {write_bill(steps, tools, installed)} components")
        return check(steps, tools, installed)
    except UnfinishedError as error:
        print(f"audit: NOT COMPLETE: {error}")
        return UNCHECKED


if __name__ == "__main__":
    sys.exit(main())
