"""Is this Python one that MLX runs on? One line with the cure when not. Must run on any Python 3."""

import platform
import subprocess
import sys


def problem():
    if sys.version_info < (3, 11):
        return "Python %d.%d is too old: install 3.11 or newer and call make PYTHON=python3.11" % sys.version_info[:2]
    if sys.platform == "darwin":
        asked = ["/usr/sbin/sysctl", "-n", "sysctl.proc_translated"]
        if platform.machine() != "arm64" or subprocess.run(asked, capture_output=True, text=True).stdout.strip() == "1":
            return (
                "this Python is an Intel one (or runs under Rosetta): MLX needs an arm64 Python, e.g. from python.org"
            )
    return None


if __name__ == "__main__":
    found = problem()
    if found:
        sys.stderr.write("mlx-pare: %s\n" % found)
        sys.exit(1)
