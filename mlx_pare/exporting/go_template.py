"""Translates a chat template from Jinja to Go, which Ollama uses, by asking for the texts around the messages.

No program translates Jinja. But a template turns a conversation into a text before, between and after its messages, and
the text at a place is almost always the same. So the model's own template writes conversations with marked messages,
and the texts at each place are cut out. Then other, longer conversations are built from these texts and compared with
the template. If they differ, there is no translation, and a note gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..base.errors import PareError

Messages = Sequence[tuple[str, str]]  # (role, content)
Write = Callable[[Messages], str]  # a conversation as the template writes it, ready for the model's answer

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
MARKS = ("Aq7zX", "Bk3wY", "Cm9vZ", "Dp5uW")  # no template contains, trims or changes these
# Conversations that the texts were taken from are no proof
PROOF: tuple[tuple[str, ...], ...] = (
    (USER,),
    (SYSTEM, USER),
    (USER, ASSISTANT, USER),
    (SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER),
    (USER, ASSISTANT, USER, ASSISTANT, USER, ASSISTANT, USER),
)
# How models mark their thoughts; a template may remove them from earlier answers
THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)
PADDED = ("  spaces around \n", "\n an answer\n\n", " more ")
CONTENTS = ('Who\'s "there"?', "{{ .Content }} {% x %}", "naïve 日本", "two\nlines, and a number: 12", "ok", "Q", "z")


@dataclass(frozen=True)
class Texts:
    """The texts before a message, by its role and the role before it ("": none), and the text after the last
    message."""

    before: Mapping[tuple[str, str], str]  # (role before, role)
    after: str

    def without(self, first: str) -> Texts:
        """Return the texts without ``first`` at the very beginning."""
        before = {place: text if place[0] else text.removeprefix(first) for place, text in self.before.items()}
        return Texts(before, self.after)

    def write(self, messages: Messages) -> str:
        """Write the conversation, without any template."""
        parts, last = [], ""
        for role, content in messages:
            parts += [self.before[last, role], content]
            last = role
        return "".join(parts) + self.after


def read(write: Write) -> Texts:
    """Find the texts of a template.

    If the template has no place for a system message, only conversations without one are translated. Raises PareError,
    with the reason, for a template that does more than put texts around messages.
    """
    plain = _pieces(write, (USER, ASSISTANT, USER))
    before = {("", USER): plain[0], (USER, ASSISTANT): plain[1], (ASSISTANT, USER): plain[2]}
    proof = PROOF
    try:
        head = _pieces(write, (SYSTEM, USER))
        before |= {("", SYSTEM): head[0], (SYSTEM, USER): head[1]}
    except (ValueError, PareError):
        proof = tuple(roles for roles in PROOF if SYSTEM not in roles)
    found = Texts(before, plain[3])
    for roles in proof:
        messages = list(zip(roles, CONTENTS, strict=False))
        try:
            expected = write(messages)
        except ValueError as error:
            raise PareError(f"its chat template fails on a conversation: {error}") from error
        if found.write(messages) != expected:
            raise PareError(f"its chat template writes {', '.join(roles)} in another way than shorter conversations")
    for start, end in THOUGHTS:
        answer = f"{start}\nWhy?\n{end}\n\nok"
        if _differs(found, write, [(USER, "Q"), (ASSISTANT, answer), (USER, "z")]):
            raise PareError(f"its chat template takes thoughts ({end}) out of earlier answers, which Ollama's cannot")
    return found


def trims(found: Texts, write: Write) -> bool:
    """Tell whether a template strips white space from both ends of messages, which its translation keeps."""
    return _differs(found, write, list(zip((USER, ASSISTANT, USER), PADDED, strict=True)))


def _differs(found: Texts, write: Write, messages: Messages) -> bool:
    """Tell whether the template writes a conversation differently. A conversation that it refuses shows nothing."""
    try:
        return write(messages) != found.write(messages)
    except ValueError:
        return False


def _pieces(write: Write, roles: Sequence[str]) -> list[str]:
    """Return the texts around marked messages. Raises PareError unless each mark appears once, in order."""
    marks = MARKS[: len(roles)]
    try:
        text = write(list(zip(roles, marks, strict=True)))
    except ValueError as error:
        raise PareError(f"its chat template fails on a conversation: {error}") from error
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found or mark in text:
            raise PareError(f"its chat template does not write every message ({', '.join(roles)}) once, in order")
        pieces.append(piece)
    return [*pieces, text]


# ---- Go ----


def go_string(text: str) -> str:
    """Quote a text as a string of Go, in ASCII, in which neither Go's templates nor a Modelfile see anything
    special."""
    quoted = []
    for character in text:
        code = ord(character)
        if character in '"\\':
            quoted.append("\\" + character)
        elif character == "\n":
            quoted.append("\\n")
        elif 32 <= code < 127:
            quoted.append(character)
        else:
            quoted.append(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
    return f'"{"".join(quoted)}"'


def go_template(texts: Texts) -> str:
    """Write the texts as a Go template over .Messages, each with .Role and .Content (Ollama, template/template.go).

    Every text is a string inside an action. Only white space stands between the actions, and all of it is trimmed.
    """

    def say(text: str) -> str:
        return f"{{{{- {go_string(text)} }}}}" if text else ""

    def branch(role: str) -> str:
        before = {last: text for (last, now), text in texts.before.items() if now == role}
        found = [f'{{{{- if eq $last "{last}" }}}}{say(text)}' for last, text in before.items() if last]
        first = say(before.get("", before.get(USER, "")))
        return "{{- else }}".join([*found, first]) + "{{- end }}" * len(found) + "{{- .Content }}"

    roles = [role for role in (SYSTEM, USER, ASSISTANT) if any(now == role for _, now in texts.before)]
    lines = ['{{- $last := "" }}', "{{- range $i, $_ := .Messages }}"]
    for number, role in enumerate(roles):
        lines.append(f'{{{{- {"else if" if number else "if"} eq .Role "{role}" }}}}{branch(role)}')
    lines += [
        "{{- end }}",
        "{{- $last = .Role }}",
        "{{- end }}",
        '{{- if eq $last "user" }}' + say(texts.after) + "{{- end }}",
    ]
    return "\n".join(lines)
