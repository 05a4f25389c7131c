"""300 fixed strings on which tokenizers disagree: the same on every run, built without any file.

``CATEGORIES`` maps a name to its strings, ``ALL`` is all of them in that order.
"""

from __future__ import annotations

import random

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
