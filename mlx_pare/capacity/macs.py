"""Every Mac, and how many bytes macOS lets its GPU keep resident.

Memory sizes of Macs are in GiB, as Apple counts them; everything else is in bytes. The table macs.csv has a source for
every row, and flags for how well its cells are known.
"""

from __future__ import annotations

import csv
import difflib
import platform
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ..base.errors import UsageError
from ..options import option

GIB = 2**30

# Metal's recommendedMaxWorkingSetSize on macOS 26: (memory up to this many GiB, share of memory, how well it is known).
# V: read in the logs of Macs (llama.cpp's, mlx's device_info, Ollama's, LM Studio's). A: assumed.
WORKING_SET_26 = (
    (8, 2 / 3, "V"),  # 5726.63 MB
    (24, 0.74, "V"),  # 12713.12, 14302.25 and 19069.67 MB of 16, 18 and 24 GiB
    (48, 0.78, "V"),  # 26800.60, 30150.67 and 40200.90 MB of 32, 36 and 48
    (96, 0.81, "V"),  # 55662.79 MB of 64, 79626 MiB of 96
    (192, 0.84, "V"),  # 115448.73 MB of 128, 173173.08 of 192
    (256, 0.87, "V"),  # 222.7 GiB
    (512, 0.90625, "V"),  # 475136 MiB
)
# The same on older macOS (15.7.7 still has it, 26.1 has the new one): 11453.25 MB of 16 GiB, 17179.89 of 24, 22906.50
# of 32; 28991.03 of 36, 51539.61 of 64, 103079.22 of 128; 208 GiB of 256 and 464 of 512. 192 GiB was not found.
WORKING_SET_OLDER = ((32, 2 / 3, "V"), (128, 0.75, "V"), (192, 0.75, "A"), (256, 0.8125, "V"), (512, 0.90625, "V"))
NEW_WORKING_SET = 16  # macOS 26 calls itself 16 to programs built before it; 16 to 25 do not exist

# Left for macOS and everything else if the wired limit is raised by hand: 92000 MB of 96 GiB were wired on a Mac Studio
# without trouble (ds4 46); a limit close to all memory freezes the machine (exo PR 1672). A value between is assumed.
LEFT_TO_MACOS = 6 * GIB
LEFT_TO_MACOS_SHARE = 0.06


@dataclass(frozen=True)
class Mac:
    """One Mac configuration. ``memory_gb`` is in GiB; None means unknown.

    ``flags``: how well bandwidth/memory/TFLOPS are known: V read in a source, R recalled, D derived, U unknown.
    ``wired_limit_bytes`` (iogpu.wired_limit_mb), ``working_set_bytes`` (from Metal) and ``macos`` (major version) are
    known only for the Mac this runs on.
    """

    name: str
    chip: str
    gpu_cores: int | None
    memory_gb: float
    bandwidth_gb_s: float | None
    tflops: float | None
    flags: str
    source: str = ""
    wired_limit_bytes: int | None = None
    working_set_bytes: int | None = None
    macos: int | None = None

    @property
    def generation(self) -> int:
        """The number in the chip's name, 4 for "M4 Pro"; 0 if it is no M chip."""
        number = self.chip.partition(" ")[0].removeprefix("M")
        return int(number) if number.isdigit() else 0

    def unsure(self, cell: str) -> bool:
        """Tell whether ``cell`` ("bandwidth", "memory", "tflops") is recalled or unknown, or its sources disagree."""
        flag = self.flags.split("/")[("bandwidth", "memory", "tflops").index(cell)]
        return flag[0] not in "VD" or "R" in flag or "disagree" in flag


def mac_name(chip: str, gpu_cores: int | None, memory_gb: int) -> str:
    """Make the name of a configuration: "m4-pro-20c-24gb", or "m4-pro-24gb" without cores.

    Args:
        chip: as in "M4 Pro".
        gpu_cores: number of GPU cores; None: left out.
        memory_gb: memory in GiB.
    """
    cores = f"-{gpu_cores}c" if gpu_cores else ""
    return f"{chip.lower().replace(' ', '-')}{cores}-{memory_gb}gb"


def every() -> list[Mac]:
    """List every configuration in macs.csv, oldest first."""
    return list(_table())


@cache
def _table() -> tuple[Mac, ...]:
    with Path(__file__).with_name("macs.csv").open(encoding="utf-8", newline="") as file:
        return tuple(_mac(row) for row in csv.DictReader(file))


def _mac(row: dict[str, str]) -> Mac:
    cores, memory = int(row["gpu_cores"]), int(row["memory_gb"])
    bandwidth, tflops = (float(row[key]) if row[key] else None for key in ("bandwidth_gb_s", "tflops"))
    return Mac(
        mac_name(row["chip"], cores, memory), row["chip"], cores, memory, bandwidth, tflops, row["flags"], row["source"]
    )


def find(name: str) -> Mac:
    """Find a Mac by a name like "m4-pro-20c-24gb", or "m4-24gb" (the one with most GPU cores); "24gb" is any Mac.

    Raises UsageError with the nearest names if there is no such Mac.
    """
    known = {mac_name(m.chip, None, m.memory_gb): m for m in sorted(every(), key=lambda m: m.gpu_cores or 0)}
    known |= {m.name: m for m in every()}
    asked = "-".join(name.lower().replace("_", "-").split()).removeprefix("apple-")
    if re.fullmatch(r"[0-9.]+gi?b", asked):
        return of_memory(gib(asked))
    if asked in known:
        return known[asked]
    near = difflib.get_close_matches(asked, known, n=4, cutoff=0.7)
    cure = f"the nearest are {', '.join(near)}" if near else "write chip and memory, such as m4-24gb or m4-pro-20c-24gb"
    raise UsageError(f"no Mac is known as {name!r}", cure)


def here() -> Mac | None:
    """Return the Mac this runs on, with its own wired limit and macOS version; None elsewhere.

    A configuration that the table lacks gets the speeds of its chip with the same cores, or unknown speeds.
    """
    if sys.platform != "darwin":
        return None
    from ..base.machine import this_machine

    machine = this_machine()
    chip = (machine.chip or "unknown").removeprefix("Apple ")
    memory = round(machine.memory_bytes / GIB)
    same = [m for m in every() if m.chip == chip and machine.gpu_cores in (None, m.gpu_cores)]
    nearest = max(same, key=lambda m: (m.memory_gb == memory, m.gpu_cores), default=None)
    cores = machine.gpu_cores or (nearest.gpu_cores if nearest else None)
    unknown = Mac("", chip, cores, memory, None, None, "U/U/U")
    version = platform.mac_ver()[0].partition(".")[0]
    return replace(
        nearest or unknown,
        name=mac_name(chip, cores, memory),
        memory_gb=memory,
        wired_limit_bytes=machine.wired_limit_bytes,
        working_set_bytes=machine.working_set_bytes,
        macos=int(version) if version else None,
    )


def gib(text: str) -> float:
    """Read GiB from "24GB" (as Apple writes it), "24GiB" or "24". Raises UsageError if it is none, or not 1 to 4096."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:g|gb|gib)?\s*", text.lower())
    if not found or not 1 <= float(found[1]) <= 4096:
        raise UsageError(f"cannot read {text!r} as the memory of a Mac", 'write "24GB"')
    return float(found[1])


def of_memory(memory_gib: float) -> Mac:
    """Return a Mac of which only the memory is known: it has a budget, but no speeds."""
    size = int(memory_gib) if memory_gib == int(memory_gib) else memory_gib
    return Mac(f"{size}gb", "unknown", None, size, None, None, "U/U/U")


@dataclass(frozen=True)
class Budget:
    """How the GPU's share of memory is set. ``macos``: major version assumed for every Mac except this one.

    ``limit_bytes``: iogpu.wired_limit_mb as it would be set, in bytes. ``reserve_bytes``: kept free for other programs.
    """

    macos: int = 26
    limit_bytes: int | None = None
    reserve_bytes: int = 0

    def __post_init__(self) -> None:
        option.check(self)

    def of(self, mac: Mac) -> int:
        """Return the bytes a model may take: a limit that is set, else Metal's value, else a share of memory."""
        set_to = self.limit_bytes or mac.wired_limit_bytes or mac.working_set_bytes
        return max((set_to or int(mac.memory_gb * GIB * self._share(mac)[0])) - self.reserve_bytes, 0)

    def unsure(self, mac: Mac) -> bool:
        """Tell whether the budget relies on a share of memory that was never measured."""
        asked = self.limit_bytes or mac.wired_limit_bytes or mac.working_set_bytes
        return not asked and self._share(mac)[1] != "V"

    def _share(self, mac: Mac) -> tuple[float, str]:
        table = WORKING_SET_26 if (mac.macos or self.macos) >= NEW_WORKING_SET else WORKING_SET_OLDER
        return next(((share, flag) for limit, share, flag in table if mac.memory_gb <= limit), table[-1][1:])

    def most(self, mac: Mac) -> int:
        """Return the largest wired limit that leaves macOS enough memory, less the reserve; in bytes."""
        memory = mac.memory_gb * GIB
        return int(memory - max(LEFT_TO_MACOS, LEFT_TO_MACOS_SHARE * memory)) - self.reserve_bytes
