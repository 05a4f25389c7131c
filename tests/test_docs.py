"""README.md and docs: every command that they show works, every number that is cheap to make is today's, every link
leads somewhere, and the English is plain. scripts/run_docs_commands.py runs the slow commands too."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from tests.exporting.test_export import needs_llama

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import run_docs_commands as commands
import write_cli_docs

from mlx_pare.cli.app import app

ROOT = commands.ROOT
PAGES = commands.pages()
WRITTEN = [page for page in PAGES if page.name != "cli.md"]  # by people
TO_RUN = commands.to_run()
SLOW = ("demo", "recover", "stability")  # scripts/run_docs_commands.py runs these; here their options are read
SMALL = {"evaluate": "--samples 2 --length 32", "calibrate": "--samples 4 --length 32 --data book.txt"}


def ids(value: object) -> str:
    return value.command if isinstance(value, commands.Shown) else getattr(value, "name", str(value))


# ---- commands ----


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, commands.Workshop]:
    return {}


@pytest.fixture
def shop(made, pico_models, pare, tmp_path_factory) -> commands.Workshop:
    """Where MODEL, RUN and the other names of the pages exist."""
    if not made:
        place = tmp_path_factory.mktemp("docs")
        call = lambda arguments: pare(*arguments).code  # noqa: E731 only for this
        made["shop"] = commands.Workshop(place, pico_models("llama"), call, "--samples 4 --length 32")
    return made["shop"]


def test_the_pages_show_commands():
    assert len(PAGES) >= 16 and len(TO_RUN) > 60
    assert {each.words[1] for each in TO_RUN} > {command.name for command in app.registered_commands}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_a_command_that_is_not_run_says_why(page):
    for each in commands.shown(page):
        runs = each.words[0] == "mlx-pare"
        assert runs or each.reason, f"{page.name}: {each.command} needs a mark: # {commands.MARK} REASON"
        assert each.reason is None or len(each.reason.split()) > 1


def read(words: list[str]) -> None:
    """Have the parser read a command: it knows every option, and takes every value."""
    group = typer.main.get_command(app)
    group.make_context("mlx-pare", ["--help"] if words[1].startswith("-") else words[1:2], resilient_parsing=True)
    if not words[1].startswith("-"):
        group.commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_in_the_text_are_read(shop, page, monkeypatch):
    """Those in console blocks too, also the ones that are not run."""
    monkeypatch.chdir(shop.fresh(commands.Shown(page.name, "mlx-pare status RUN"), 1000 + PAGES.index(page)))
    for each in commands.inline(page):
        if not re.fullmatch(r"mlx-pare [\w-]+( --[\w-]+)?", each.command):  # the name of a command, or of an option
            read(each.words)
        else:
            assert each.words[1] in typer.main.get_command(app).commands or each.words[1].startswith("--")
    for each in commands.shown(page):
        if "mlx-pare" in each.words:
            read(each.words[each.words.index("mlx-pare") :])


def quick(each: commands.Shown, shop: commands.Workshop) -> list[str]:
    """The arguments of a command, with options that make it quick."""
    name, added = each.words[1], shop.ways(each)
    if name in SMALL and "--tasks" not in each.words:
        added = shlex.split(SMALL[name])
    if "probes" in each.words:
        added = ["--dry-run"]  # scripts/run_docs_commands.py asks them all
    if name == "run" and "--dry-run" not in each.words:
        added.append("--dry-run")
    if name == "export" and "--dry-run" not in each.words:
        added.append("--no-verify")
    return [*each.words[1:], *added]


def is_quick(each: commands.Shown) -> bool:
    checks = "--check" in each.words  # tests/cli/test_self_check.py runs it
    return each.words[1] not in SLOW and not checks and not needs_quantizer(each)


def needs_quantizer(each: commands.Shown) -> bool:
    return each.words[1] == "export" and "q4_k_m" in each.words and "--dry-run" not in each.words


def run(each: commands.Shown, shop: commands.Workshop, pare, monkeypatch) -> str:
    """Run a command as it is shown, quickly; returns what it wrote."""
    place = shop.fresh(each, TO_RUN.index(each))
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLX_PARE_CACHE", str(shop.place / "cache"))
    if each.words[1] == "run" and "--data" in each.words:  # a dry run reads no text
        texts = [word for i, word in enumerate(each.words) if {"--data", "--field"} & {word, each.words[i - 1]}]
        assert pare("calibrate", "MODEL", "--out", "READ", *texts, *shlex.split("--samples 4 --length 32")).code == 0
    before = {file for file in place.rglob("*")}
    done = pare(*quick(each, shop))
    assert done.code == 0, done.err
    outputs = [each.words[i + 1] for i, word in enumerate(each.words[:-1]) if word in commands.OUTPUTS]
    if "--dry-run" not in quick(each, shop):
        assert all((place / output).exists() for output in outputs)
    else:
        assert {file for file in place.rglob("*")} == before, "a dry run has written something"
    return done.out


@pytest.mark.parametrize("each", [each for each in TO_RUN if is_quick(each)], ids=ids)
def test_a_command_works_as_it_is_shown(each, shop, pare, monkeypatch):
    written = run(each, shop, pare, monkeypatch)
    assert written
    shows = [other.output for page in PAGES for other in commands.shown(page) if other.command == each.command]
    for line in (line for output in shows for line in output):
        head = " ".join(line.removesuffix("...").split())
        assert head in " ".join(written.split()), f"{each.command} does not write {line!r}"


@needs_llama
@pytest.mark.parametrize("each", [each for each in TO_RUN if needs_quantizer(each)], ids=ids)
def test_a_command_that_needs_llama_cpp_works_as_it_is_shown(each, shop, pare, monkeypatch):
    run(each, shop, pare, monkeypatch)


# ---- what is generated or drawn ----


def test_cli_page_is_what_the_commands_say():
    assert write_cli_docs.PAGE.read_text("utf-8") == write_cli_docs.page(), "run: python scripts/write_cli_docs.py"


def test_every_option_is_on_the_cli_page():
    page = write_cli_docs.PAGE.read_text("utf-8")
    for name, command in typer.main.get_command(app).commands.items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            if parameter.name not in write_cli_docs.EVERYWHERE and parameter.param_type_name == "option":
                assert f"`{parameter.opts[0]}`" in section, f"{name} {parameter.opts[0]}"


def test_the_picture_is_what_its_command_draws(pare, tmp_path, monkeypatch):
    shown = re.search(r"\*Made by `([^`]+)`", (ROOT / "README.md").read_text("utf-8"))[1]
    monkeypatch.chdir(tmp_path)
    assert pare(*shlex.split(" ".join(shown.split()))[1:]).code == 0
    drawn, kept = ((place / "fit.svg").read_text("utf-8") for place in (tmp_path, ROOT / "docs"))
    told = [re.search(r"<title>.*?</desc>", text, re.S)[0] for text in (drawn, kept)]
    assert told[0] == told[1] and "22.33 GB" in told[0]


def test_errors_of_the_estimates_are_todays():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "fit_accuracy.py"], capture_output=True, text=True)
    found = re.findall(r"^(\S.*)\n(?:  .*\n)*?  mean ([\d.]+)%, worst ([+-][\d.]+)% \((.*)\)$", done.stdout, re.M)
    assert len(found) > 8
    page = (ROOT / "docs" / "fit.md").read_text("utf-8")
    for what, mean, worst, case in found:
        assert f"| {what} | {mean} % | {worst} % ({case}) |" in page


MEASURED = {  # page, section -> the files in benchmarks/results that its tables repeat
    ("results", "Under a budget of bytes"): ["quality-bytes-novelist-9m"],
    ("results", "A real language model under a budget of bytes"): ["quality-bytes-smollm2-135m"],
    ("results", "Against other pruners"): ["quality-sizes-stories260K", "quality-sizes-novelist-9m"],
    ("results", "Recovery"): ["recovery-best-*", "recovery-factors-novelist-9m", "recovery-speed-novelist-9m"],
    ("results", "Importance matrices"): ["imatrix-novelist-9m"],
    ("results", "Reconstruction"): ["repair-*"],
    ("results", "Speed"): ["speed"],
    ("memory", "A 32B model in 3 GB"): ["real-size-*"],
    ("families", "What loads what"): ["compat"],
}


@pytest.mark.parametrize(("place", "files"), MEASURED.items(), ids=str)
def test_numbers_are_those_that_were_measured(place, files):
    """Every number of a table is one of the files, or one of them rounded."""
    results = [file for name in files for file in (ROOT / "benchmarks" / "results").glob(f"{name}.md")]
    text = " ".join(file.read_text("utf-8") for file in results).replace(",", "")
    known = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text)]
    known += [value / 1000 for value in known]  # the files have MB where the page has GB
    section = (ROOT / "docs" / f"{place[0]}.md").read_text("utf-8").split(f"\n## {place[1]}\n")[1].split("\n## ")[0]
    cells = " ".join(line for line in section.splitlines() if line.startswith("|")).replace(",", "")
    numbers = re.findall(r"(?<![\w.])(?:\d+\.\d+|\de-\d+)(?! %)", cells)
    assert len(numbers) > 8

    def measured(number: str) -> bool:
        digits = len(number.partition(".")[2])
        room = 0 if "e-" in number else 0.501 * 10.0**-digits
        return any(abs(float(number) - value) <= room for value in known)

    assert not [number for number in numbers if not measured(number)]


# ---- the Python API ----


def test_examples_of_the_python_api_run(pico_models, two_texts, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "python-api.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) > 10
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(pico_models("llama")), "TEXT": two_texts["data"]}
    for block in blocks:
        exec(compile(block, "docs/python-api.md", "exec"), names)
    assert (tmp_path / "RUN" / "report.md").exists() and "worth it" in capsys.readouterr().out.lower()
    assert names["timed"]["models"] and names["made"].after.bytes < names["made"].before.bytes


# ---- form ----


def prose(page: Path) -> Iterator[str]:
    """The paragraphs and items of lists of a page, without code, tables and headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    kept = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "!")))
    for part in re.split(r"\n\s*\n|\n(?=\s*(?:-|\d+\.) )", kept):
        if part.strip():
            yield " ".join(part.split())


def test_readme_is_a_page():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_lines_of_text_are_short(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]


FOREIGN = re.compile(r"\bso many\b|\bbut for\b|\bof its own\b|\bof their own\b|\bwhich is said\b|\banew\b|\bbeside\b|"
                     r"\bas one once\b|\bhealed\b|\bhealing\b|\bours\b|\band said so\b", re.I)  # fmt: skip
LONGEST = 25  # words of a sentence; a list of names counts as one


@pytest.mark.parametrize("page", WRITTEN, ids=ids)
def test_english_is_plain(page):
    for part in prose(page):
        assert not FOREIGN.search(part), f"{page.name}: {FOREIGN.search(part)[0]!r} in: {part}"
        part = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)|\([^)]*\)", "X", part)
        for sentence in re.split(r"(?<=[.;:?!])\s", part.replace("e.g. ", "").replace("et al. ", "")):
            words = re.sub(r"(?:\w[\w.-]*, )+", "LIST, ", sentence).split()
            assert len(words) <= LONGEST, f"{page.name}: {len(words)} words: {sentence}"


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(other), f"{page.name}: {target}"


NAMED = re.compile(r"\b(?:benchmarks|scripts|tests)/[\w/-]+\.(?:py|sh|md|csv)\b")


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_a_page_names_are_there(page):
    missing = {name for name in NAMED.findall(page.read_text("utf-8")) if not (ROOT / name).exists()}
    assert not missing


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    assert not [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text]
