"""What macOS tells of memory and files, read from recorded output; and how much of both a process may take."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import subprocess
import sys
import time

import psutil
import pytest

from mlx_pare.base import children, console, machine

# vm_stat of a Mac with 16 GB after a file of 6 GB was read (shortened)
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                          280000.
Pages speculative:                         5000.
Pages wired down:                        120000.
Pages purgeable:                           2000.
"Translation faults":                 123456789.
File-backed pages:                       390000.
Anonymous pages:                         190000.
Pages stored in compressor:              100000.
"""


def test_pages_that_macos_can_read_again_are_free():
    assert machine._droppable(VM_STAT) == 16384 * (10000 + 5000 + 2000 + 390000)
    assert machine._droppable("") == 0


def test_free_memory_on_a_mac_is_the_larger_of_two_answers(monkeypatch):
    free = psutil.virtual_memory().available
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_working_set", lambda: None)
    for pages, expected in ((1, None), (1 << 28, 16384 << 28)):
        said = f"(page size of 16384 bytes)\nPages free: {pages}.\n"
        monkeypatch.setattr(
            machine.subprocess, "run", lambda *_, said=said, **__: subprocess.CompletedProcess([], 0, said)
        )
        found = machine.available_bytes()
        assert found == expected if expected else abs(found - free) < 4 << 30


def test_the_structure_of_macos_is_as_its_header_says():
    """bsd/sys/resource.h: a UUID of 16 bytes and 35 numbers of 8, of which these are the 8th and the 34th."""
    found = machine._usage()
    assert ctypes.sizeof(found) == 16 + 35 * 8
    assert (type(found).footprint.offset, type(found).peak_footprint.offset) == (16 + 7 * 8, 16 + 33 * 8)


def test_the_footprint_is_the_peak_on_a_mac(monkeypatch):
    class Libproc:
        def proc_pid_rusage(self, pid, flavor, place):
            assert (pid, flavor) == (os.getpid(), 4)
            found = place._obj
            found.footprint, found.peak_footprint = 5 << 30, 6 << 30
            return 0

    monkeypatch.setattr(machine, "_libproc", Libproc)
    assert machine.peak_rss_bytes() == 6 << 30


def test_a_process_may_open_as_many_files_as_it_needs(monkeypatch):
    before, set_to = resource.getrlimit(resource.RLIMIT_NOFILE), []
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: set_to.append(limits))
    for limits in ((256, resource.RLIM_INFINITY), (256, 1024), (8192, 1 << 20)):
        monkeypatch.setattr(resource, "getrlimit", lambda what, limits=limits: limits)
        machine.allow_files()
    assert set_to == [(4096, resource.RLIM_INFINITY), (1024, 1024)]
    monkeypatch.undo()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


@pytest.mark.parametrize("known", [True, False])
def test_what_is_written_leaves_the_cache_of_the_drive(tmp_path, monkeypatch, known):
    asked = []

    def asked_for(handle, what):
        asked.append(what)
        if not known:
            raise OSError(45, "Operation not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", asked_for)
    monkeypatch.setattr(os, "fsync", lambda handle: asked.append("fsync"))
    with (tmp_path / "f").open("wb") as file:
        machine.to_disk(file.fileno())
    assert asked == ([51] if known else [51, "fsync"])


def test_a_child_that_takes_too_much_memory_is_killed():
    """Where the system limits nothing, as on macOS; also what the child itself started."""
    hungry = "import time; a = bytearray(400 << 20); a[::4096] = b'x' * len(a[::4096]); time.sleep(60)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hungry!r}])"
    begun = time.monotonic()
    for code in (hungry, nested):
        assert children.run([sys.executable, "-c", code], timeout=60, most=200 << 20).returncode < 0
    assert children.run([sys.executable, "-c", "print(1)"], most=200 << 20).stdout == "1\n"
    assert time.monotonic() - begun < 30


# ---- on what something is computed ----

MAC = {"mlx": "0.32.0", "device": "gpu", "chip": "Apple M1", "macos": "15.1"}


def test_what_the_bytes_of_a_result_depend_on(monkeypatch):
    import mlx.core as mx

    here = {"mlx": mx.__version__, "device": mx.default_device().type.name}
    told = {"machdep.cpu.brand_string": "Apple M4 Pro", "kern.osproductversion": "26.1"}
    monkeypatch.setattr(machine, "sysctl", told.get)
    assert machine.computes_on() == here | {"chip": "Apple M4 Pro", "macos": "26.1"}
    monkeypatch.setattr(machine, "sysctl", lambda _: None)
    assert machine.computes_on() == here | {"chip": None, "macos": None}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"mlx": "0.33.0"}, "mlx was 0.32.0, now it is 0.33.0"),
        ({"device": "cpu"}, "device was gpu, now it is cpu"),
        ({"chip": "Apple M4"}, "chip was Apple M1, now it is Apple M4"),
        ({"macos": "26.1"}, "macos was 15.1, now it is 26.1"),
        ({"chip": None, "macos": None}, "chip was Apple M1, now it is unknown; macos was 15.1, now it is unknown"),
    ],
)
def test_what_goes_on_elsewhere_is_told_in_one_line(monkeypatch, capsys, change, told):
    now = MAC | change
    monkeypatch.setattr(machine, "computes_on", lambda: now)
    assert machine.went_on([MAC]) == [MAC, now]
    line = f"warning: it goes on elsewhere than it was begun ({told}): results agree to rounding only\n"
    assert capsys.readouterr().err == line
    assert machine.went_on([MAC, now]) == [MAC, now]
    assert capsys.readouterr().err == line  # it is still not where it was begun


def test_what_goes_on_where_it_was_begun_is_not_told(monkeypatch, capsys):
    monkeypatch.setattr(machine, "computes_on", lambda: dict(MAC))
    other = MAC | {"device": "cpu"}
    assert machine.went_on([MAC]) == [MAC] and machine.went_on([MAC, other]) == [MAC, other]
    assert machine.went_on([]) == []  # an earlier version began it
    assert machine.went_on([{"mlx": "0.32.0"}]) == [{"mlx": "0.32.0"}, MAC]  # one that noted less
    assert not capsys.readouterr().err


def test_a_warning_is_given_once_for_an_open_run(tmp_path, capsys):
    for _ in range(2):
        with console.logged(tmp_path), console.logged(tmp_path / "stage-1"):
            console.warn_once("something")
            console.warn_once("something")
        assert capsys.readouterr().err == "warning: something\n"
