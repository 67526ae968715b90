"""Sees to the browser that the report's tests drive: python3 tools/chromium.py

Debian's or Ubuntu's package; as root it is installed where it is missing, otherwise one line says
what to do and the tests that need it fail with the same words.

FUSEDNORM_NO_CHROMIUM: 1 does without the browser and its tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# A font is only recommended by the package, and text without one has no width.
INSTALL = (
    ("apt-get", "update", "-qq"),
    ("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-dejavu-core"),
)
ADVICE = (
    "the report's tests open it in headless Chromium. As root: apt-get update && apt-get install "
    "-y chromium fonts-dejavu-core; elsewhere put a chromium or google-chrome on PATH. "
    "FUSEDNORM_NO_CHROMIUM=1 does without these tests"
)


def find() -> str | None:
    """The browser's path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def install() -> bool:
    """Installs the package where that is ours to do; whether the browser is there afterwards."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    print("chromium: installing the system's package", flush=True)
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in INSTALL:
        done = subprocess.run(command, env=environ, stdout=subprocess.DEVNULL)
        # A repository that is out of reach need not be the one that has the package.
        if done.returncode and "install" in command:
            return False
    return find() is not None


def main() -> int:
    if os.environ.get("FUSEDNORM_NO_CHROMIUM") == "1":
        print("chromium: FUSEDNORM_NO_CHROMIUM=1, the report is NOT tested in a browser")
    elif find() is None and not install():
        # Not an error yet: everything else can still be tested, and the report's tests will say it.
        print(f"chromium: not found; {ADVICE}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
