"""Run every mlx-pare command that README.md and docs/*.md show, in full, on the demo model.

    python scripts/run_docs_commands.py [--only TEXT] [--work DIR] [--list]

A command stands behind "$ " in a console block. Commands are run as they are shown, in a folder where MODEL, RUN,
book.txt and so on exist under these names; only options that make a command small are added (``ways``). What cannot be
run says so in the page: "# not run in tests: REASON". tests/test_docs.py runs the quick ones of the same commands.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "mlx_pare" / "demo"
MARK = "not run in tests:"
STATES = ("calibrate", "score", "plan", "reconstruct", "prune")  # of a run directory, by the step that was done last
NEEDS = {"score": "calibrate", "plan": "score", "reconstruct": "plan", "prune": "reconstruct", "recover": "prune",
         "stability": "prune"}  # fmt: skip
OUTPUTS = ("-o", "--out", "--ollama", "--mlx", "--hub-ready", "--plot")
SMALL = {  # options that make a command quick
    "run": "--samples 8 --length 64 --try 2 --recover-steps 3 --train-rows 8 --trials 1",
    "calibrate": "--samples 8 --length 64",
    "plan": "--try 2",
    "recover": "--recover-steps 2 --train-rows 8",
    "evaluate": "--samples 4 --length 64",
    "bench": "--trials 1 --prompt 8 --new 4",
    "stability": "--draws 2",
}


@dataclass
class Shown:
    """A command that a page shows. ``reason``: why it is not run, if the page says so; ``output``: the lines that the
    page shows behind it."""

    page: str
    command: str
    reason: str | None = None
    output: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)


# ---- what the pages show ----


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown(page: Path) -> Iterator[Shown]:
    """The commands in the console blocks of a page."""
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        found: Shown | None = None
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                if found:
                    yield found
                command, _, comment = line[2:].partition("   # ")
                reason = comment.removeprefix(MARK).strip() if comment.startswith(MARK) else None
                found = Shown(page.name, command.strip(), reason)
            elif found:
                found.output.append(line)
        if found:
            yield found


def inline(page: Path) -> Iterator[Shown]:
    """The commands of mlx-pare in the text and the tables of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    for command in re.findall(r"`(mlx-pare [a-z][^`]+)`", text):
        command = " ".join(command.split())
        if "OPTIONS" not in command and "..." not in command:
            yield Shown(page.name, command)


def to_run() -> list[Shown]:
    """Every distinct command of mlx-pare that is to be run, from the page that shows it first."""
    first: dict[str, Shown] = {}
    for page in pages():
        for each in shown(page):
            if each.words[0] == "mlx-pare" and each.reason is None:
                first.setdefault(each.command, each)
    return list(first.values())


# ---- where they run ----

Call = Callable[[list[str]], int]  # arguments of mlx-pare -> exit code


class Workshop:
    """A folder where the names of the pages exist: made of one float model, by commands of mlx-pare."""

    def __init__(self, place: Path, model: Path, call: Call, small: str):
        """``small``: options of the runs that are made here."""
        self.place, self.call, self.states = place, call, place / "states"
        self.base = place / "base"
        self.base.mkdir(parents=True)
        self.states.mkdir()
        for name in ("MODEL", "FLOAT_MODEL"):
            shutil.copytree(model, self.base / name)
            talks(self.base / name)
        self._texts()
        with inside(self.base):
            self._did("export", "MODEL", "--gguf", "q8_0", "-o", "model.gguf", "--no-verify")
            self._runs(shlex.split(small))
            adapter(self.base / "MODEL", self.base / "ADAPTER")
        self.bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        self._tight = 0

    def _did(self, *arguments: str) -> None:
        if code := self.call([*arguments]):
            raise SystemExit(f"mlx-pare {' '.join(arguments)} ended with {code}")

    def _texts(self) -> None:
        lines = [p for p in (DEMO / "calibration.txt").read_text("utf-8").split("\n") if p.strip()]
        parts = [lines[start::5] for start in range(5)]
        (self.base / "notes").mkdir()
        for name, part in (("notes/a.md", parts[0]), ("notes/b.txt", parts[1]), ("book.txt", parts[2])):
            (self.base / name).write_text("\n\n".join(part), "utf-8")
        records = [{"text": line, "body": line} for line in parts[3]]
        (self.base / "src.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
        task = {"prompt": "What is the capital of France?", "check": {"contains": "Paris"}, "max_tokens": 8}
        (self.base / "tasks.jsonl").write_text(json.dumps(task), "utf-8")
        turns = [{"messages": [{"role": "user", "content": line}]} for line in parts[4]]
        (self.base / "chats.jsonl").write_text("\n".join(map(json.dumps, turns)), "utf-8")

    def _runs(self, small: list[str]) -> None:
        text = [option for option in small if option]
        steps = {"calibrate": ["MODEL", "--out", "RUN", "--data", "notes/", *text], "score": ["RUN"],
                 "plan": ["RUN", "--keep", "0.75", "--try", "1"], "reconstruct": ["RUN"], "prune": ["RUN"]}  # fmt: skip
        for step in STATES:
            self._did(step, *steps[step])
            shutil.copytree("RUN", self.states / step)
        shutil.rmtree("RUN")
        self._did("run", "MODEL", "--out", "RUN", "--keep", "0.75", "--data", "notes/", "--widths", "even",
                  "--recover-steps", "1", "--train-rows", "4", "--trials", "0", "--gguf", "q8_0", *text)  # fmt: skip
        shutil.copytree("RUN/prune/model", "PRUNED")
        shutil.move("RUN", self.states / "all")

    @property
    def tight(self) -> int:
        """The least context, in steps of 256 tokens, at which the model does not fit an m4-24gb any more."""
        if not self._tight:
            from mlx_pare import fit
            from mlx_pare.capacity.memory import Use

            low, high = 1, 1 << 20
            while low < high:
                middle = (low + high) // 2
                fits = fit(self.base / "MODEL", "m4-24gb", Use(256 * middle))["rows"][0]["fits"]
                low, high = (middle + 1, high) if fits else (low, middle)
            self._tight = 256 * low
        return self._tight

    def fresh(self, each: Shown, number: int) -> Path:
        """A folder for one command: what it reads is there, what it writes is not."""
        place, words = self.place / f"at-{number}", each.words
        place.mkdir()
        outputs = {words[i + 1].split("/")[0] for i, word in enumerate(words[:-1]) if word in OUTPUTS}
        for entry in self.base.iterdir():
            if entry.name not in outputs:
                (place / entry.name).symlink_to(entry)
        if "RUN" not in outputs:
            shutil.copytree(self.states / NEEDS.get(words[1], "all"), place / "RUN")
        return place

    def ways(self, each: Shown) -> list[str]:
        """The options that are added, so that a command is quick, and has something to cut."""
        words = each.words
        more = shlex.split(SMALL.get(words[1], ""))
        if words[1] == "fit" and "MODEL" in words and "--kv-bits" in words:
            more += ["--runtime", "llama.cpp"]  # the heads of a small model are no whole groups of MLX
        if words[1] == "export" and "--imatrix" in words:
            more += ["--samples", "4", "--length", "64"]
        if words[1] in ("run", "plan"):
            more += ["--context", str(self.tight)] if "--for" in words else []
            more += ["--min-speed", "0.01"] if "--min-speed" in words else []
            more += ["--target-size", f"{self.bytes * 6 // 10}B"] if "--target-size" in words else []
        return more


class inside:
    """The working directory, for a while."""

    def __init__(self, place: Path):
        self.place = place

    def __enter__(self) -> None:
        self.before = Path.cwd()
        os.chdir(self.place)

    def __exit__(self, *_: object) -> None:
        os.chdir(self.before)


def talks(model: Path) -> None:
    """Give a model a chat template, if it has none."""
    file = model / "tokenizer_config.json"
    found = json.loads(file.read_text("utf-8"))
    found.setdefault("chat_template", "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    file.write_text(json.dumps(found), "utf-8")


def adapter(model: Path, out: Path) -> None:
    """A LoRA adapter as mlx-lm's trainer writes it, drawn at random."""
    import mlx.core as mx
    import mlx_lm
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    lora = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    module, _ = mlx_lm.load(str(model))
    module.freeze()
    linear_to_lora_layers(module, -1, lora)
    mx.random.seed(0)
    arrays = {name: mx.random.normal(a.shape) / 20 for name, a in tree_flatten(module.trainable_parameters())}
    out.mkdir()
    mx.save_safetensors(str(out / "adapters.safetensors"), arrays)
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": lora, "model": str(model)}
    (out / "adapter_config.json").write_text(json.dumps(config), "utf-8")


# ---- all of them, on the demo model ----


def called(arguments: list[str]) -> int:
    """mlx-pare in a process; what it says is shown only if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mlx_pare", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n", flush=True)
    return done.returncode


def floats(out: Path) -> Path:
    """The demo model with float weights: some commands take no packed one."""
    import mlx_lm

    mlx_lm.convert(str(DEMO / "model"), str(out), dequantize=True, dtype="bfloat16")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="commands with this text in them")
    parser.add_argument("--work", type=Path, help="where there is room for 3 GB (default: where temporary files go)")
    parser.add_argument("--list", action="store_true", help="show the commands and run none")
    asked = parser.parse_args()
    chosen = [each for each in to_run() if asked.only in each.command]
    if asked.list:
        print("\n".join(f"{each.page}: {each.command}" for each in chosen))
        return
    sys.path.insert(0, str(ROOT))
    failed = 0
    with tempfile.TemporaryDirectory(dir=asked.work) as place:
        shop = Workshop(Path(place) / "shop", floats(Path(place) / "floats"), called, "--samples 8 --length 64")
        for number, each in enumerate(chosen):
            added, at, started = shop.ways(each), shop.fresh(each, number), time.monotonic()
            with inside(at):
                code = called([*each.words[1:], *added])
            failed += code != 0
            line = f"{'ok' if code == 0 else f'FAILED {code}'}  {time.monotonic() - started:5.1f} s  {each.command}"
            print(line + (f"   (with {' '.join(added)})" if added else ""), flush=True)
            shutil.rmtree(at)
    print(f"{len(chosen) - failed} of {len(chosen)} commands ended well")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
