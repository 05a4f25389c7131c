"""The run directory: the settings, the finished steps and their inputs. It resumes the same work and refuses any other.

    RUN/manifest.json   schema, source, versions, machine, one record per finished step (written last)
    RUN/recipe.toml     exactly what was asked
    RUN/<step>/         the outputs of a step; RUN/<step>.partial/ while it works, renamed when it is done
    RUN/log.txt         messages and errors (base/log.py)
    RUN/kept/           while a run works: what several steps need of the original (stream/kept.py)

A step is skipped only if its parameters and the hashes of its inputs are the same and its outputs are whole. A cheap
check compares the size and some bytes of big files. Before the first work of a process, all their bytes are compared
with those of before, because bits may flip on a disk. File dates do not matter, so copies are fine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .. import __version__
from ..base import console, log, machine, untrusted
from ..base.errors import PareError, Refused, shell, told
from ..base.plain_path import files_below, is_litter
from ..base.units import gb
from ..options import recipe_file
from . import edited, locks
from .atomic import is_ours, replace_file, sweep
from .manifest import MANIFEST, NOTE, RECIPE, Manifest, StepRecord, noted, read_manifest, read_recipe, require_run
from .schema import dump_json

BIG_FILE = 64 << 20
PIECES = 256
QUICK = "quick:"  # the fingerprint of a big file begins with it
PATIENCE_S = 0.3  # for a lock, because `status` takes it for a moment
HARMLESS = {".lock", log.NAME}  # a killed start leaves these in a new directory


def fingerprint(path: Path) -> str:
    """Hash a file with sha256; of a big one its size and PIECES pieces of 4 KiB, evenly from its start to its end."""
    size = path.stat().st_size
    with untrusted.regular(path) as file:
        if size <= BIG_FILE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size}".encode())
        for i in range(PIECES):
            digest.update(os.pread(file.fileno(), 1 << 12, max(0, size - (1 << 12)) * i // (PIECES - 1)))
        return QUICK + digest.hexdigest()


def sha256(path: Path, bar: console.Progress) -> str:
    """Hash a whole file, whatever its size; ``bar`` counts the MiB."""
    digest = hashlib.sha256()
    with untrusted.regular(path) as file:
        while part := file.read(8 << 20):
            digest.update(part)
            bar.advance(math.ceil(len(part) / (1 << 20)))
    return digest.hexdigest()


def is_locked(path: Path) -> bool | None:
    """Whether a process works on the run directory ``path``. None: its file system has no locks, so nobody can tell.
    This needs no permission to write there."""
    try:
        with untrusted.regular(path / ".lock") as lock:
            free = locks.acquire(lock.fileno(), shared=True)
    except FileNotFoundError:
        return False
    return None if free is None else not free


class Run:
    """An opened run directory, locked against other processes until it is closed; a context manager.

    Only a process that helps the owner of the lock, and writes nothing, opens it without the lock (``locked``).
    """

    def __init__(
        self,
        path: Path,
        model: Path | None = None,
        identity: str | None = None,
        locked: bool = True,
        origin: dict[str, str] | None = None,
    ):
        self.path = Path(path)
        self._file = self.path / MANIFEST
        if model is None:
            require_run(self._file)
        if model is not None and self.path.exists() and not self.path.is_dir():
            raise Refused(f"{self.path} exists and is not a directory", "choose another --out")
        self._refuse_foreign()
        self.path.mkdir(parents=True, exist_ok=True)
        self._alone = False  # whether the lock keeps other processes out
        self._lock = self._acquire(locked)
        self._logged = ExitStack()
        self._locked = locked
        self.kept: Path | None = None  # where several steps share results (stream/kept.py); None: nowhere
        self._sound = False  # whether the bytes of this run have been compared in this process
        try:
            self.manifest = self._open(model, identity, origin)
        except BaseException:
            self._lock.close()
            raise
        if self._alone:
            sweep(self.path)
        if locked:
            self._logged.enter_context(console.logged(self.path))
            log.write(self.path, "started", f"mlx-pare {__version__}: {' '.join(sys.argv[1:])}")

    def _refuse_foreign(self) -> None:
        """Raises Refused for a directory that holds something else, before even the lock is written there."""
        if self._file.exists() or not self.path.exists():
            return
        others = sorted(p.name for p in self.path.iterdir() if not _harmless(p))
        if others:
            raise Refused(
                f"{self.path} is not empty and is no run directory ({others[0]} is in it)", "choose another --out"
            )

    def _acquire(self, locked: bool) -> BinaryIO:
        """Open the lock file, and lock it if ``locked``. Raises Refused if another process has the lock."""
        lock = untrusted.regular(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        given_up = time.monotonic() + PATIENCE_S
        while locked:
            if (got := locks.acquire(lock.fileno())) is None:
                console.warn(f"{self.path} is on a file system without locks: see that no other mlx-pare works on it")
            if got is not False:
                self._alone = bool(got)
                break
            if time.monotonic() > given_up:
                lock.close()
                raise Refused(
                    f"another mlx-pare is working on {self.path}",
                    f"wait for it (`mlx-pare status {shell(self.path)}` says how far it is), or use another --out",
                )
            time.sleep(PATIENCE_S / 10)
        return lock

    def _open(self, model: Path | None, identity: str | None, origin: dict[str, str] | None) -> Manifest:
        if self._file.exists():
            manifest = read_manifest(self.path)
            if identity is not None and manifest.source != identity:
                raise Refused(
                    f"{self.path} belongs to {manifest.model}, which is another model than {model} or was "
                    f"changed since",
                    "use another --out",
                )
            if model is not None and manifest.model != (now := str(model.resolve())):
                manifest.model = now  # somebody moved the same model
                replace_file(self._file, dump_json(manifest))
            return manifest
        manifest = Manifest(
            model=str(model.resolve()),
            source=identity,
            versions=machine.versions(),
            machine=machine.this_machine().as_dict(),
            origin=origin,
            computed_on=[machine.computes_on()],
        )
        replace_file(self._file, dump_json(manifest))
        return manifest

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if error is not None:
            log.write(self.path, "trace", "".join(traceback.format_exception(error)))
            log.write(self.path, "error", told(error)[0])
        self.close()

    def close(self) -> None:
        """Give up the lock, so that another process may work on the directory."""
        if not self._lock.closed and self._locked:
            log.write(self.path, "ended", "the process lets go of the run")
        self._logged.close()
        self._lock.close()

    @property
    def model(self) -> Path:
        return Path(self.manifest.model)

    def directory(self, step: str) -> Path:
        return self.path / step

    def output(self, step: str, name: str) -> Path:
        """The path of a finished step's file. Raises PareError if the step is not finished, or the file is missing."""
        if step not in self.manifest.steps or not (self.path / step / name).exists():
            raise PareError(
                f"{self.path} has no finished {step} step", f"do it first: `mlx-pare {step} {shell(self.path)}`"
            )
        return self.path / step / name

    def recipe(self) -> dict[str, Any]:
        """Read the settings that the run began with, by the fields of settings.Settings, and "model".

        Raises Refused if the file is missing, because defaults would then take the place of the settings."""
        found = read_recipe(self.path)
        if found is None:
            raise Refused(
                f"{self.path / RECIPE} is missing, which says on what text the run works",
                f"`mlx-pare calibrate {shell(self.model)} --out {shell(self.path)}` writes it again, with the --data, "
                "--samples and --length of before",
            )
        return found

    def write_recipe(self, asked: Mapping[str, Any], replace: bool = True) -> None:
        """Write the settings that were given, without those that were left out.

        An earlier recipe is kept unless ``replace``. A recipe with the same settings is always kept, because people may
        have written comments. A recipe with other settings is renamed if people changed it."""
        if not replace and (self.path / RECIPE).exists():
            return
        text = recipe_file.toml(asked)
        with suppress(PareError, OSError, ValueError):  # an unreadable recipe counts as different
            if tomllib.loads(untrusted.contents(self.path / RECIPE).decode("utf-8")) == tomllib.loads(text):
                return
        edited.replace(self.path / RECIPE, text.encode("utf-8"))

    # ---- steps ----

    def step(
        self,
        name: str,
        parameters: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[Path], Any],
        editable: bool = False,
        resumes: bool = False,
    ) -> bool:
        """Do ``work(directory)`` unless it was done the same way before.

        Args:
            name: of the step and its directory.
            parameters: what the step depends on, for JSON.
            inputs: a hash by name for each input.
            work: writes the outputs into the directory that it gets.
            editable: people may change the outputs (plan.json), which is no damage.
            resumes: ``work`` continues what it finds in the directory; otherwise the rest of a killed call is deleted.
        Returns:
            Whether the work was done now.
        Raises:
            Refused: the step was done, or begun and ``resumes``, with other parameters or inputs; or files changed.
        """
        asked = {"parameters": json.loads(json.dumps(dict(parameters), default=str)), "inputs": dict(inputs)}
        final = self.path / name
        record = self.manifest.steps.get(name)
        if record is not None and final.exists():
            self._same(name, {"parameters": record.parameters, "inputs": record.inputs}, asked)
            self._whole(name, record, editable)
            console.say(f"{name}: done before, kept")
            return False
        self._compare()
        partial = self._working(name, asked, resumes)
        console.record("begun", name)
        started, swapped = time.monotonic(), machine.swap_bytes()
        machine.reset_peaks()
        with machine.awake():
            work(partial)
        os.rename(partial, final)
        outputs = {str(f.relative_to(final)): fingerprint(f) for f in files_below(final)}
        big = {f"{name}/{file}": final / file for file, seen in outputs.items() if seen.startswith(QUICK)}
        self.manifest.contents |= _contents(big, f"{name}: hash")
        done = StepRecord(
            **asked,
            outputs=outputs,
            seconds=round(time.monotonic() - started, 3),
            peak_bytes=machine.peak_rss_bytes(),
            peak_mlx_bytes=machine.peak_gpu_bytes(),
            swap_growth_bytes=max(0, machine.swap_bytes() - swapped),
        )
        self.manifest.steps[name] = done
        replace_file(self._file, dump_json(self.manifest))
        console.record("done", f"{name}: {done.seconds:.1f} s, at most {gb(done.peak_bytes)}")
        return True

    def _working(self, name: str, asked: Mapping[str, Any], resumes: bool) -> Path:
        """Prepare a step's working directory, with a note of parameters and inputs. Raises Refused as ``step``."""
        final, partial = self.path / name, self.path / f"{name}.partial"
        for place in (final, partial):
            if place.is_symlink():  # the target of the link is not ours to empty
                raise Refused(f"{place} is a link, and mlx-pare makes none", "remove the link")
        for place in [final] if resumes else [final, partial]:
            if not (place / NOTE).is_file():  # every step begins with this note: other files are not ours
                _set_aside(place, {NOTE})
        if final.exists():  # finished, but killed before the manifest had it: done again, or continued
            shutil.rmtree(partial, ignore_errors=True)
            os.rename(final, partial)
        if not resumes:
            shutil.rmtree(partial, ignore_errors=True)
        elif (begun := noted(partial)) is not None:
            self._same(name, begun, asked)
        partial.mkdir(exist_ok=True)
        if self._alone:
            sweep(partial, deep=True)
        replace_file(partial / NOTE, dump_json(asked))
        return partial

    def forget(self, name: str) -> None:
        """Delete a step, to do it again. Its record goes first, so that a kill leaves an unfinished step."""
        record = self.manifest.steps.pop(name, None)
        _set_aside(self.path / name, {NOTE, *(record.outputs if record else ())})
        replace_file(self._file, dump_json(self.manifest))
        for place in (self.path / name, self.path / f"{name}.partial"):
            shutil.rmtree(place, ignore_errors=True)

    def _compare(self) -> None:
        """Compare all bytes of the model's weights and of the big outputs with those of before, once per process.
        Raises Refused if some differ. Also note on what this process computes; a warning says if that changed."""
        if self._sound:
            return
        if (on := machine.went_on(self.manifest.computed_on)) != self.manifest.computed_on:
            self.manifest.computed_on = on
            replace_file(self._file, dump_json(self.manifest))
        known = self.manifest.contents
        weights = {f"model:{f.name}": f for f in sorted(self.model.glob("*.safetensors")) if not is_litter(f)}
        outputs = {name: self.path / name for name in known if (self.path / name).is_file()}
        now = _contents(weights | outputs, "compare with before")
        for name, digest in now.items():
            if known.get(name, digest) != digest:
                redo = f"delete {shell(self.path / name.partition('/')[0])} to do the step again"
                raise Refused(
                    f"{(weights | outputs)[name]} has other bytes than before: it was changed since, or is damaged",
                    redo if name in outputs else "restore it, or use another --out",
                )
        if now.keys() - known.keys():
            self.manifest.contents = known | now
            replace_file(self._file, dump_json(self.manifest))
        self._sound = True

    def _same(self, name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for part in ("parameters", "inputs"):
            for key in sorted({*before[part], *now[part]}):
                old, new = before[part].get(key), now[part].get(key)
                if old != new:
                    what = (
                        f"{key} was {old!r}, now it is {new!r}"
                        if part == "parameters"
                        else f"its input {key} changed since"
                    )
                    raise Refused(
                        f"the {name} step in {self.path} was made differently: {what}",
                        f"use another --out, or delete {shell(self.path / name)}* to do it again",
                    )

    def _whole(self, name: str, record: StepRecord, editable: bool) -> None:
        for relative, digest in record.outputs.items():
            file = self.path / name / relative
            if not file.exists():
                raise Refused(f"{file} is missing", f"delete {shell(self.path / name)} to do the step again")
            if not editable and fingerprint(file) != digest:
                raise Refused(
                    f"{file} changed since it was written", f"delete {shell(self.path / name)} to do the step again"
                )


def _set_aside(place: Path, known: set[str]) -> None:
    """Rename a directory that holds files that mlx-pare did not write, because it would be emptied otherwise.

    ``known``: the relative names of the files that mlx-pare wrote."""
    if not place.is_dir():
        return
    files = [file.relative_to(place).as_posix() for file in files_below(place)]
    if not any(
        name not in known and not is_ours(Path(name).name) and Path(name).name not in HARMLESS for name in files
    ):
        return
    number = next(n for n in itertools.count(1) if not os.path.lexists(f"{place}.yours-{n}"))
    aside = place.with_name(f"{place.name}.yours-{number}")
    os.rename(place, aside)
    console.warn(f"{place} held files that mlx-pare did not write: they are in {aside}")


def _harmless(file: Path) -> bool:
    """Whether a file may be in a directory that becomes a run directory. A link may not: writing would follow it."""
    own = file.name in HARMLESS or is_litter(file)
    return is_ours(file.name) or (own and file.is_file() and not file.is_symlink())


def _contents(files: Mapping[str, Path], what: str) -> dict[str, str]:
    """The sha256 of every file by its name, which takes about half a second per gigabyte."""
    with console.progress(f"{what}: MiB", sum(math.ceil(f.stat().st_size / (1 << 20)) for f in files.values())) as bar:
        return {name: sha256(file, bar) for name, file in files.items()}
