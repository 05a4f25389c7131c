"""300 fixed strings on which tokenizers disagree, and tokenizers trained on them.

``CATEGORIES`` maps a name to its strings, ``ALL`` is all of them in that order. They are built without any file and are
the same on every run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pico

WORDS = """
the river ran under old stone bridge where nobody waited for morning because every lamp had gone out and
winter came early that year with snow upon roofs doors hats shoulders quietly don't we'll they've she'd I'm
naturally unbelievable straightforward antidisestablishmentarianism xylophone
""".split()  # noqa: SIM905
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
UNICODE_PUNCTUATION = "—–…“”‘’«»¿¡§¶•†‡°№"
EMOJI = ["🙂", "😂", "🚀", "👍🏽", "👩‍👩‍👧", "🇩🇪", "❤️", "🏳️‍🌈", "🧠", "✅", "☃", "🤷🏿‍♀️"]
SCRIPTS = (
    "你好世界 今天天气很好",
    "これはテストです。カタカナとひらがな",
    "한국어 문장입니다 안녕하세요",
    "Привет, как дела? Ёлка",
    "Ελληνικά γράμματα και λέξεις",
    "שלום עולם איך אתה",
    "مرحبا بالعالم كيف الحال ١٢٣",
    "नमस्ते दुनिया कैसे हो १२३",
    "สวัสดีชาวโลก ๑๒๓",
    "Xin chào thế giới, tiếng Việt có dấu",
    "漢字とkanaとlatin mixed１２３全角ＡＢＣ",
    "ქართული ენა და Հայերեն լեզու",
)
CODE = (
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2]}\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n",
    '<div class="x">\n  <p>it\'s &amp; that</p>\n</div>',
    "SELECT * FROM t WHERE a >= 10 AND b != 'c''d';",
    'if err != nil {\n\t\treturn nil, fmt.Errorf("%w: %d", err, 42)\n\t}',
    "x = lambda *a, **k: (a, k) if a else None  # why?",
    "https://example.org/a/b?c=d&e=%20f#g-h_i",
    "user.name+tag@mail.example.co.uk",
    "C:\\Users\\me\\file (1).txt",
    "$HOME/.config && rm -rf ./build/*.o || exit 1",
    '{"key": [1, 2.5e-10, null, true], "k2": "\\u00e9\\n"}',
    'let v: Vec<&\'static str> = vec!["a", "b"];',
    "\\begin{align} a_1^2 &= \\frac{1}{2} \\\\ \\end{align}",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n* item\n  1. sub\n",
    "0xDEADBEEF 0b1010 1_000_000 1e-9 .5 5. -0.0",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
    "//// ==== #### ---- ____ ****",
    "a\r\nb\r\n\r\n    c\r\n",
    "#!/usr/bin/env bash\nset -euo pipefail\n",
    "print(f'{x!r:>10}', end='')",
    "i++; --j; a<<=2; b>>>1; c?.d ?? e",
    "@decorator\nclass A(B, metaclass=C): ...\n",
    "\t\tindented\twith\ttabs\t",
    "if(a&&!b||c==d){e=f?g:h;}",
    "1+1=2, 2*3=6, 7//2==3, 7%2!=0",
)


def _digits(rng: random.Random) -> list[str]:
    runs = ["".join(rng.choice("0123456789") for _ in range(n)) for n in range(1, 16)]
    dressed = ["3.14159", "1,234,567.89", "12:34:56", "2024-02-29", "+49 (0)30 1234567", "v1.2.3-rc4", "50%", "$1234.5"]
    return runs + dressed + ["x1y22z333w4444", "１２３４５ ١٢٣٤ ½ ² Ⅷ", " 12  345   6789", "007 1st 2nd 33rd 100th 4x4"]


def _prose(rng: random.Random, count: int) -> list[str]:
    found = []
    for _ in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 14))]
        words = [w.upper() if rng.random() < 0.1 else w.title() if rng.random() < 0.1 else w for w in words]
        marks = [rng.choice(["", "", "", "", ",", ".", ";", "!", "?", "...", " -"]) for _ in words]
        found.append(" ".join(w + m for w, m in zip(words, marks, strict=True)))
    return found


def _spaces(rng: random.Random, count: int) -> list[str]:
    gaps = [" ", "  ", "   ", "     ", " " * 8, " " * 17, "\u00a0", "\u3000", "\u2003"]
    found = [" ", "  ", "   ", " " * 12, " a", "a ", "  a", "a  ", "   a   b   "]
    while len(found) < count:
        found.append("".join(rng.choice(WORDS) + rng.choice(gaps) for _ in range(rng.randint(1, 6))))
    return found


def _lines(rng: random.Random, count: int) -> list[str]:
    breaks = ["\n", "\n\n", "\t", "\r\n", " \n", "\n ", "\n\t", "\n\n\n", "\t\t", "  \n  "]
    found = ["\n", "\n\n", "\t", "\r\n", " \n", "\n\n\n\n", "a\n", "\na", "a\n\nb", "a \n b"]
    while len(found) < count:
        found.append("".join(rng.choice(WORDS) + rng.choice(breaks) for _ in range(rng.randint(1, 6))))
    return found


def _marks(rng: random.Random, count: int) -> list[str]:
    both = PUNCTUATION + UNICODE_PUNCTUATION
    found = []
    for i in range(count):
        if i % 2:
            found.append("".join(rng.choice(both) for _ in range(rng.randint(1, 10))))
        else:
            found.append("".join(rng.choice(WORDS) + rng.choice(both) * rng.randint(1, 3) for _ in range(3)))
    return found


def _emoji(rng: random.Random, count: int) -> list[str]:
    found = list(EMOJI)
    while len(found) < count:
        gap = rng.choice(["", " ", "\n"])
        found.append(gap.join(rng.choice([rng.choice(EMOJI), rng.choice(WORDS)]) for _ in range(rng.randint(2, 6))))
    return found


def _scripts(rng: random.Random, count: int) -> list[str]:
    found = list(SCRIPTS)
    while len(found) < count:
        gap = rng.choice(["", " ", "。", "\n"])
        found.append(f"{rng.choice(WORDS)} {rng.choice(SCRIPTS)}{gap}{rng.choice(SCRIPTS)}")
    return found


def _control(count: int) -> list[str]:
    codes = [*range(32), 0x7F, 0x80, 0x85, 0x9F, 0xAD, 0x200B, 0x200D, 0x200E, 0x2028, 0x2029, 0xFEFF, 0xFFFD]
    chosen = [chr(codes[i * len(codes) // count]) for i in range(count)]
    return [f"a{c}b {c}{c} c{c}" if i % 2 else c for i, c in enumerate(chosen)]


def _accents(count: int) -> list[str]:
    words = ["naïve", "café", "Straße", "Ångström", "œuvre", "Łódź", "şişe", "İstanbul", "ﬁne", "ǅ", "ﬀ", "ß", "ſ's"]
    words += ["K", "µm"]
    decomposed = ["cafe\u0301", "n\u0303", "a\u030a\u0323", "o\u0308\u0308", "i\u0307", "\u0301", "e\u0301's"]
    found = words + decomposed
    return (found + [f"{a} {b}" for a, b in zip(words, reversed(words), strict=True)])[:count]


def _long(rng: random.Random) -> list[str]:
    letters = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(900))
    return [
        "a" * 1000,
        letters,
        "ab" * 300,
        letters.upper()[:300],
        "-" * 400,
        "é" * 200,
        "你" * 200,
        "Aa" * 99 + "1" * 99,
    ]


def _contractions() -> list[str]:
    tails = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'Re", "’s", "'x", "''s"]
    return [f"it{t}" for t in tails] + ["don't 'tis rock'n'roll O'Neill", "I'D'VE 's't're've'm'll'd"]


def _build() -> dict[str, list[str]]:
    rng = random.Random(300)
    return {
        "digits": _digits(rng),
        "spaces": _spaces(rng, 30),
        "newlines and tabs": _lines(rng, 30),
        "emoji": _emoji(rng, 24),
        "scripts": _scripts(rng, 26),
        "code": list(CODE),
        "control characters": _control(24),
        "accents": _accents(30),
        "punctuation": _marks(rng, 28),
        "contractions": _contractions(),
        "long": _long(rng),
        "prose": _prose(rng, 33),
    }


CATEGORIES = _build()
ALL = [text for texts in CATEGORIES.values() for text in texts]
assert len(ALL) == 300, len(ALL)

# ---- tokenizers ----

ROWS = 3000
RICH = [
    *pico.TEXT.read_text("utf-8").split("\n"),
    *ALL * 4,
]  # so that there are merges of digits, emoji, spaces


# as they stand in the tokenizer.json of Llama 3, Qwen2 and Qwen3.5 (llama.cpp src/llama-vocab.cpp quotes them)
_START, _END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?", r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _START + r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+" + _END
QWEN2 = _START + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + _END
QWEN35 = _START + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + _END
REGEX = {"llama-bpe": LLAMA3, "smaug-bpe": LLAMA3, "qwen2": QWEN2, "qwen35": QWEN35}


def steps_of(pre: str) -> list:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    if pre in REGEX:
        return [Split(Regex(REGEX[pre]), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    return [Digits(individual_digits=True)] * (pre == "smollm") + [ByteLevel(add_prefix_space=False)]


def write_bpe(directory: Path, pre: str, normalizer: dict | None = None, specials: Sequence[str] = ()) -> None:
    """A byte-level tokenizer trained on RICH that splits text as llama.cpp's pre-tokenizer ``pre`` should.

    One word stays in the vocabulary without the merge that leads to it, so that ignore_merges makes a difference.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    steps = steps_of(pre)
    tok.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 50,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tok.train_from_iterator(RICH, trainer)
    raw = json.loads(tok.to_str())
    assert "Ġxylophone" in raw["model"]["vocab"]
    raw["model"]["merges"] = [pair for pair in raw["model"]["merges"] if "".join(pair) != "Ġxylophone"]
    raw["model"]["ignore_merges"] = pre == "llama-bpe"
    raw["normalizer"] = normalizer
    tok = Tokenizer.from_str(json.dumps(raw))
    tok.add_tokens([AddedToken(s, normalized=False) for s in specials])
    tok.save(str(directory / "tokenizer.json"))


def write_spm(directory: Path, normalizers: list, pre_tokenizer) -> None:
    """A SentencePiece-style tokenizer trained on RICH, its merges as converters write them.

    They list every pair of tokens that makes a token, ordered by the score of the result (transformers
    convert_slow_tokenizer.generate_merges), where training records one pair each.
    """
    from tokenizers import Tokenizer, models, trainers

    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=ROWS - 50, special_tokens=special, show_progress=False, limit_alphabet=300)
    tok.train_from_iterator((w for text in RICH for w in text.replace(" ", " \u2581").split(" ")), trainer)
    raw = json.loads(tok.to_str())
    vocab = raw["model"]["vocab"]
    results = ["".join(pair) for pair in raw["model"]["merges"]]
    splits = [[(t[:i], t[i:]) for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab] for t in results]
    raw["model"]["merges"] = [
        pair for pairs in splits for pair in sorted(pairs, key=lambda p: (vocab[p[0]], vocab[p[1]]))
    ]
    raw["added_tokens"] = raw["added_tokens"][:3]
    raw["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    raw["pre_tokenizer"] = pre_tokenizer
    (directory / "tokenizer.json").write_text(json.dumps(raw))


def wrong_by_category(directory: Path, theirs: list[list[int]], skip=lambda text: False) -> dict[str, str]:
    """Categories of ALL in which ``theirs`` is not what tokenizer.json says: how many, and the first with both."""
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(directory / "tokenizer.json"))
    left, wrong = iter(theirs), {}
    for category, texts in CATEGORIES.items():
        pairs = [(t, tok.encode(t, add_special_tokens=False).ids, next(left)) for t in texts]
        bad = [(t, a, b) for t, a, b in pairs if a != b and not skip(t)]
        if bad:
            wrong[category] = f"{len(bad)} of {len(texts)}, first {bad[0]}"
    return wrong
