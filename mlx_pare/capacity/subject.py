"""Open what fit takes: a directory, a config.json, a GGUF file, a run, a model on the hub, a name of the catalogue.

Each becomes a Subject: an architecture and bytes. Bytes are counted if tensors are listed, and predicted if only a
config is known. Headers are read, weights never.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arch import Architecture, describe
from ..base import console, units
from ..base.errors import PareError, Unsupported, UsageError, shell
from ..base.untrusted import check_links, read_json
from ..gguf.header import is_gguf
from ..model import footprint
from ..model.checkpoint import Checkpoint
from ..model.footprint import Storage
from ..model.foreign_formats import foreign
from ..model.weight_files import read_headers, told
from ..sources import catalogue
from ..sources.open_model import ggufs_in, require
from ..tensors.packing import Packing
from ..tensors.safetensors import DTYPE_BYTES, FLOATS, Entry
from . import planner, storage as quantization
from .form import Form
from .planner import Weights

if TYPE_CHECKING:
    from ..gguf.header import Header
    from ..model.hub_name import HubName
    from ..sources.hub_cache import RemoteTensor

    Listed = Mapping[str, Entry | RemoteTensor]  # name -> tensor, of a directory or of the hub

USUAL = Packing(4, 64)  # what most people run, and the default of mlx_lm.convert -q
# No model is as large as this.
LIMITS = {r".*(size|heads|experts|_dim)(_per_.*)?": 10**7}
# Parts of a checkpoint that mlx-lm drops when it loads a language model (the sanitize methods in mlx_lm/models).
DROPPED = ("vision_tower", "visual.", "vision_model", "multi_modal_projector", "mtp.", "audio_tower", "embed_vision",
           "embed_audio", "rotary_emb.inv_freq")  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One model in one form. ``arch`` is None for an unknown model type: then only ``weights`` is known.

    ``storage``: how a tensor of this architecture, or of a smaller one, is stored; None if only the sum is known.
    ``packing``: that of most matrices; None for floats and GGUF. ``value_bytes``: width of the dtype it computes in.
    ``checkpoint``: a directory that could be cut. ``notes``: what is unknown or assumed.
    """

    name: str
    origin: str
    form: Form
    described: str
    weights: Weights
    arch: Architecture | None
    storage: Storage | None = None
    packing: Packing | None = None
    value_bytes: int = 2
    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()

    @property
    def llama(self) -> bool:
        """Whether it is, or will be, a GGUF file."""
        return bool(self.form.gguf) or (self.origin == "gguf" and not self.form.given)


def open_subject(asked: str, form: Form) -> Subject:
    """Open a model by path or name. Raises PareError if it cannot be read, UsageError if there is none."""
    path = Path(asked)
    if asked and os.path.isdir(path):  # pathlib raises for a name that is too long
        planned = path / "plan" / "plan.json"
        if planned.exists() and not (path / "config.json").exists():
            return _planned(planned, form)
        return _directory(path, form)
    if os.path.isfile(path):
        return _file(path, form)
    if (entry := catalogue.find(asked)) and "/" not in asked:
        return _catalogued(entry, form)
    from ..model.hub_name import on_hub

    if name := on_hub(asked):
        return _remote(name, form)
    raise catalogue.unknown(asked)


def _file(path: Path, form: Form) -> Subject:
    if is_gguf(path):
        return _gguf(path, form)
    found = read_json(path, "file")
    if "criterion" in found and "layers" in found:
        return _planned(path, form)
    if "model_type" not in found:
        raise UsageError(f"{path} is neither a config.json nor a plan.json", "a config.json says its model_type")
    return _configured(str(path), "config", found, form)


# ---- from a config alone ----


def _catalogued(entry: catalogue.Entry, form: Form) -> Subject:
    notes = () if entry.flag == "V" else (f"recalled in part: {entry.note}",)
    if not (form.given or quantization.stays_packed(entry.config)):
        form = Form(USUAL)
        notes = ("4 bits in groups of 64 are assumed, the usual packing: --bits or --gguf for another", *notes)
    found = _configured(entry.name, "catalogue", entry.config, form)
    return replace(found, notes=(*found.notes, *notes))


def _configured(name: str, origin: str, config: Mapping[str, Any], form: Form) -> Subject:
    found = _predicted(name, origin, config, _described(config), form, quantization.value_bytes(config))
    alien = None if form.given else foreign(config, {})
    return replace(found, notes=(alien.note,)) if alien and alien.note else found


def _described(config: Mapping[str, Any], untied: bool | None = None) -> Architecture:
    """Describe the architecture of a config. Raises PareError if a size is beyond reason: the config is not ours."""
    inner = config.get("text_config")
    for key, value in [*config.items(), *(inner.items() if isinstance(inner, dict) else ())]:
        most = next((most for pattern, most in LIMITS.items() if re.fullmatch(pattern, key)), None)
        if most and isinstance(value, int) and value > most:
            raise PareError(f"config.json says {key} = {str(value)[:30]}, more than any model has ({most})")
    return describe(config, untied)


def _predicted(
    name: str, origin: str, config: Mapping[str, Any], arch: Architecture, form: Form, width: int
) -> Subject:
    """Predict a subject, without counting bytes: in the form that was asked for, else as the config says."""
    own, described, packing = quantization.described(config, width)
    if form.given:
        described, packing = str(form), form.packing
    storage = form.storage(arch, width) or own
    weights = form.weights(arch, storage)
    return Subject(name, origin, form, described, weights, arch, storage, packing, form.floats or width)


# ---- from listed tensors ----


def _directory(path: Path, form: Form) -> Subject:
    """Open a model directory and count its bytes. If it could be cut, it is opened as for pruning."""
    check_links(path)
    if ggufs := ggufs_in(path):
        return _first_of(ggufs, form)
    if (path / "manifest.json").exists() and not (path / "config.json").exists():
        raise PareError(f"{path} is a run without a plan", f"make one with `mlx-pare plan {shell(path)}`")
    config = read_json(path / "config.json", "model config")
    listed = read_headers(path)
    if not listed and not (path / "model.safetensors.index.json").exists():
        found = _configured(str(path), "config", config, form)
        return replace(found, notes=(*found.notes, "no weights are there: predicted from config.json"))
    found = _listed(str(path), "directory", config, listed, form)
    try:
        checkpoint = Checkpoint(path)
        arch = checkpoint.arch
    except Unsupported:
        return found  # mlx-pare can plan for it, but not cut it
    if checkpoint.leftovers:
        found = replace(found, notes=(*found.notes, told(checkpoint.leftovers)))
    if form.given:
        return replace(found, checkpoint=checkpoint)
    like, packing, width = footprint.like(checkpoint), checkpoint.quantization, checkpoint.value_bytes
    weights = replace(planner.stored(arch, like), nbytes=checkpoint.nbytes())
    return replace(
        found, weights=weights, arch=arch, storage=like, packing=packing, value_bytes=width, checkpoint=checkpoint
    )


def _first_of(files: list[Path], form: Form) -> Subject:
    """Open the first of several GGUF files."""
    found = _gguf(files[0], form)
    if len(files) == 1:
        return found
    note = f"of {len(files)} .gguf files this is {files[0].name}: give the path of another"
    return replace(found, notes=(*found.notes, note))


def _remote(name: HubName, form: Form) -> Subject:
    """Open a model on the hub by its config and headers. If the hub does not give it, the catalogue may."""
    from ..sources import hub_reader

    if name.file or name.tag:
        return _remote_gguf(name, form)
    try:
        found = hub_reader.remote(str(name), console.say)
    except hub_reader.HubError as error:  # also if a licence must be accepted first
        if entry := catalogue.find(name.repo):
            known = _catalogued(entry, form)
            return replace(known, notes=(f"{error.problem}: answered from the catalogue", *known.notes))
        raise
    if not found.tensors:
        return _remote_gguf(name, form)
    return _listed(str(name), "hub", found.config, found.tensors, form)


def _remote_gguf(name: HubName, form: Form) -> Subject:
    """Open the GGUF file on the hub that the name means."""
    from ..sources.hub_gguf import gguf_header

    file, header = gguf_header(name, console.say)
    shown = name if name.file else f"{name} ({file})"
    return _of_header(str(shown), header, form)


def _listed(name: str, origin: str, config: Mapping[str, Any], listed: Listed, form: Form) -> Subject:
    """Make a subject from config and tensors, which may have names of the hub or of mlx-lm."""
    try:
        arch = _described(config, untied=any(n.endswith("lm_head.weight") for n in listed))
    except Unsupported as error:
        return _unknown(name, origin, _total(_loaded(listed, None)), error.problem, form)
    _check_present(name, arch, listed)
    loaded = _loaded(listed, arch)
    if not any(n.endswith("scales") for n in loaded):  # nothing is packed: mlx-lm loads it dense, whatever this says
        config = {**config, "quantization": None}
    found = _predicted(name, origin, config, arch, form, _width(loaded, config))
    if form.given:
        return found
    weights, alien = planner.weights_of(arch, _total(loaded)), foreign(config, {n: e.dtype for n, e in listed.items()})
    if alien and alien.note:
        return replace(found, described=f"{alien.name}, as stored", weights=weights, notes=(alien.note,))
    if any(entry.dtype.startswith("F8_E4") for entry in loaded.values()) and found.packing is None:
        return replace(found, notes=("stored as 8-bit floats, which mlx-lm unpacks on loading",))
    return replace(found, weights=weights, notes=_doubts(arch, loaded))


def _width(loaded: Listed, config: Mapping[str, Any]) -> int:
    """Return the width of the floats that take most bytes: the model computes in them."""
    taken: dict[str, int] = {}
    for entry in loaded.values():
        if entry.dtype in FLOATS:
            taken[entry.dtype] = taken.get(entry.dtype, 0) + entry.nbytes
    return DTYPE_BYTES[max(taken, key=taken.__getitem__)] if taken else quantization.value_bytes(config)


def _check_present(name: str, arch: Architecture, listed: Listed) -> None:
    """Raises PareError if one layer has a tensor by mlx-pare's name and another lacks it; other names are the hub's."""
    tensors = list(arch.tensors())
    there = {tensor.spec.name for tensor in tensors if tensor.name in listed}
    lost = [t.name for t in tensors if t.name not in listed and t.spec.name in there]
    if lost:
        more = f" and {len(lost) - 1} more tensors" if len(lost) > 1 else ""
        raise PareError(f"{name} lacks {lost[0]}{more}", "download or copy it again")


def _doubts(arch: Architecture, loaded: Listed) -> tuple[str, ...]:
    """Return a note if the files hold more or fewer plain floats than the config means."""
    counted, expected = sum(_elements(e.shape) for e in loaded.values()), footprint.parameters(arch)["total"]
    if any(e.dtype not in FLOATS for e in loaded.values()) or abs(counted - expected) <= 0.01 * expected:
        return ()
    why = "parts that mlx-lm does not load may have been counted" if counted > expected else "files may be missing"
    return (f"the files hold {units.count(counted)} values, the config means {units.count(expected)}: {why}",)


def _elements(shape: Iterable[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _total(listed: Listed) -> int:
    return sum(entry.nbytes for entry in listed.values())


def _loaded(listed: Listed, arch: Architecture | None) -> Listed:
    """Return the tensors that mlx-lm loads."""
    kept = {name: entry for name, entry in listed.items() if not any(part in name for part in DROPPED)}
    if arch is None:
        return kept
    count = len(arch.layers)
    return {n: e for n, e in kept.items() if not (arch.tied and "lm_head." in n) and not _beyond(n, count)}


def _beyond(name: str, layers: int) -> bool:
    """Tell whether a tensor lies in a block after the last: DeepSeek keeps layers there that predict further tokens."""
    _, found, rest = name.partition("layers.")
    index = rest.partition(".")[0]
    return bool(found) and index.isdigit() and int(index) >= layers


def _unknown(name: str, origin: str, nbytes: int, why: str, form: Form) -> Subject:
    notes = [f"{why}: its weights are counted, its KV cache, activations and speed cannot be known"]
    if form.given:
        notes.append(f"nor what it would take as {form}: counted as it is stored")
    return Subject(name, origin, Form(), "as stored", Weights(nbytes, nbytes), None, notes=tuple(notes))


# ---- GGUF ----


def _gguf(path: Path, form: Form) -> Subject:
    """Open a GGUF file, or all parts of one; its header gives type and bytes of every tensor."""
    from ..gguf.header import read_all

    return _of_header(str(path), read_all(path), form)


def _of_header(name: str, header: Header, form: Form) -> Subject:
    from ..gguf.read.config import config_of

    try:
        config = config_of(header)
        arch = _described(config)
    except Unsupported as error:
        return _unknown(name, "gguf", header.tensor_bytes, error.problem, form)
    if form.given:
        return _predicted(name, "gguf", config, arch, form, 2)
    total = sum(_elements(t.shape) for t in header.tensors.values())
    k_types = sum(_elements(t.shape) for t in header.tensors.values() if t.type.endswith("_K"))
    weights = planner.weights_of(arch, header.tensor_bytes)
    weights = replace(weights, k_quants=round(footprint.read_bytes(arch, footprint.dense(1)) * k_types / max(total, 1)))
    described = f"GGUF, {8 * header.tensor_bytes / footprint.parameters(arch)['total']:.2f} bits per weight"
    return Subject(name, "gguf", form, described, weights, arch)


# ---- what a plan will leave ----


def _planned(path: Path, form: Form) -> Subject:
    """Open the model that a plan.json will leave, before it exists; the manifest of the run names the model it cuts."""
    from ..pruning.layout import smaller, total_bytes
    from ..pruning.plan_file import Plan

    manifest = path.absolute().parent.parent / "manifest.json"
    if not manifest.exists():
        raise PareError(f"{path} has no manifest.json of its run two levels up", "give the run directory it belongs to")
    plan = Plan.load(path)
    model = read_json(manifest, "run manifest").get("model")
    if not isinstance(model, str):
        raise PareError(f"{manifest} does not say which model it is about", "restore it, or start a new run")
    require(Path(model), manifest.parent)
    checkpoint = Checkpoint(model)
    if problems := plan.problems(checkpoint.arch):
        raise PareError(f"{path} does not suit {checkpoint.path}: {'; '.join(problems)}", "make the plan again")
    keep, packing, width = plan.keep(checkpoint.arch), plan.packing, checkpoint.value_bytes
    arch = smaller(checkpoint, keep, packing)
    changed = f"{checkpoint.path} changed since the plan was made: `prune` will refuse it"
    notes = () if plan.source == checkpoint.identity() else (changed,)
    if form.given:
        return replace(_predicted(str(path), "plan", arch.config, arch, form, width), notes=notes)
    weights = planner.weights_of(arch, total_bytes(checkpoint, keep, packing, arch))
    described = str(packing or "as the original is stored")
    stored = packing or checkpoint.quantization
    return Subject(str(path), "plan", form, described, weights, arch, None, stored, width, notes=notes)


__all__ = ["Form", "Subject", "open_subject"]
