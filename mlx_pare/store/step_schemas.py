"""What the JSON files of steps hold, as far as reports and summaries use it. store/step_files.py reads them.

Other keys may be there: older and newer versions write them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

from .schema import Count

Number = Annotated[float, Field(ge=-1e30, le=1e30)]


class Checked(BaseModel):
    """A schema that only checks: the types are those of JSON, and NaN is not allowed."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Size(Checked):
    """size.json of an evaluation."""

    bytes: Annotated[int, Field(ge=1, le=10**30)]
    parameters: Count


class Level(Checked):
    """Sizes that all layers share."""

    layer: Count
    ffn: Count
    kv_head: Count


class Width(Checked):
    """What one layer keeps."""

    ffn: Count
    kv_head: Count
    ffn_bits: Count | None = None
    attention_bits: Count | None = None


class Candidate(Checked):
    """A candidate plan and its KL divergence, which is null if the candidate was given up."""

    level: Level | None = None
    layers: list[Width | None] | None = None
    kl: Number | None
    reconstructed_kl: Number | None = None

    @model_validator(mode="after")
    def _has_sizes(self) -> Candidate:
        if self.level is None and self.layers is None:
            raise ValueError("neither level nor layers")
        return self


class Tried(Checked):
    """tried.json of a plan."""

    widths: str
    candidates: Annotated[list[Candidate], Field(min_length=1)]
    even: Count | None
    taken: Count
    rank_correlation: dict[str, Number] | None = None

    @model_validator(mode="after")
    def _inside(self) -> Tried:
        if max(self.taken, self.even or 0) >= len(self.candidates):
            raise ValueError("taken or even is no candidate")
        return self


class Drop(Checked):
    """A layer that was dropped."""

    layer: Count
    kl: Number | None


class Layers(Checked):
    """layers.json of a plan."""

    drops: dict[str, list[Drop]]


class Done(Checked):
    """done.json of prune."""

    requantized: dict[str, Number]
    dense: list[str]


class Warned(Checked):
    """check.json of prune and recover."""

    warnings: list[str]


class Point(Checked):
    """A validation during a recovery."""

    step: Count
    loss: Number
    losses: dict[str, Number]
    train_loss: Number | None = None


class Trained(Checked):
    """The options of a recovery."""

    method: str
    steps: Count
    on_policy: Number
    kind: str
    batch: Count | None = None
    accumulate: Count | None = None
    grad_checkpoint: bool = False
    top: Count | None = None


class Recovery(Checked):
    """recovery.json of recover."""

    options: Trained
    domains: dict[str, Number]
    curve: list[Point]
    best_step: Count
    kept: str
    kl_before: Number
    kl_after: Number
    kl_unmerged: Number | None
    kl: dict[str, Number]
    local: dict[str, Any] | None

    @model_validator(mode="after")
    def _complete(self) -> Recovery:
        named = self.domains if len(self.domains) > 1 else ()
        if any(name not in point.losses for point in self.curve for name in named):
            raise ValueError("a domain without its loss")
        if "trained" in self.kl and self.kl_unmerged is None:
            raise ValueError("kl_unmerged is missing")
        if self.local and not {"pruned", "local"} <= self.kl.keys():
            raise ValueError("kl of pruned or local is missing")
        return self


class Healed(Checked):
    """local.json of an unfinished recovery: what the healing block by block depends on, and its summary."""

    of: dict[str, Any]
    done: dict[str, Any]


class Spread(Checked):
    """The spread of a number that was measured several times."""

    median: Number
    min: Number
    max: Number


class Timed(Checked):
    """A model and its speed."""

    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    peak_bytes: Spread
    ratio: dict[str, Spread]

    @model_validator(mode="after")
    def _complete(self) -> Timed:
        if not {"prefill_tokens_per_s", "decode_tokens_per_s"} <= self.ratio.keys():
            raise ValueError("a ratio is missing")
        return self


class Bench(Checked):
    """bench.json of a run: the original and the result."""

    trials: Count
    prompt_tokens: Count
    new_tokens: Count
    backend: str
    models: Annotated[list[Timed], Field(min_length=2, max_length=2)]


class Judged(Checked):
    """The result of checking a GGUF file with llama.cpp."""

    checked: bool
    reason: str = ""
    max_abs_difference: Number | None = None
    same_argmax: Number | None = None

    @model_validator(mode="after")
    def _complete(self) -> Judged:
        if self.checked and None in (self.max_abs_difference, self.same_argmax):
            raise ValueError("a difference is missing")
        return self


class Exported(Checked):
    """export.json: the GGUF file, or the reason why there is none."""

    path: str | None
    why: str = ""
    kind: str = ""
    architecture: str = ""
    bytes: Count = 0
    tensors: Count = 0
    notes: list[str] = []
    verify: Judged | None = None

    @model_validator(mode="after")
    def _complete(self) -> Exported:
        wanted = {"why"} if self.path is None else {"kind", "architecture", "bytes", "tensors"}
        if missing := sorted(wanted - self.model_fields_set):
            raise ValueError(f"{', '.join(missing)} is missing")
        return self


class Row(Checked):
    """A Mac and what the model needs on it (capacity/planner.py)."""

    mac: str
    chip: str
    memory_gb: Annotated[float, Field(gt=0, le=1e9)]
    budget_bytes: Count
    weights_bytes: Count
    kv_bytes: Count
    activation_bytes: Count
    total_bytes: Count
    fits: bool
    headroom_bytes: Number
    max_context: Count
    scores_bytes: Count | None = None
    verdict: Literal["fits", "tight", "over"] | None = None
    unsure: list[str] = []


class Growth(Checked):
    """Memory at one context."""

    context: Annotated[int, Field(ge=1, le=10**30)]
    weights_bytes: Count
    kv_bytes: Count
    activation_bytes: Count
    total_bytes: Count
    scores_bytes: Count | None = None


class Fits(Checked):
    """fits.json of an export."""

    context: Annotated[int, Field(ge=1, le=10**30)]
    rows: Annotated[list[Row], Field(min_length=1)]
    gguf_rows: list[Row]
    original_rows: list[Row] | None = None
    original_fits: Count
    curve: list[Growth] | None = None
    original_curve: list[Growth] | None = None

    @model_validator(mode="after")
    def _same_sizes(self) -> Fits:
        sizes = {row.memory_gb for row in self.rows}
        for other in (self.gguf_rows, self.original_rows):
            if other and {row.memory_gb for row in other} != sizes:
                raise ValueError("rows of other Macs")
        return self


class Agreed(Checked):
    """How well two choices of units on one axis agree."""

    rank_correlation: Number
    same: Number


class Axes(Checked):
    """How well two choices of units agree, by axis."""

    axes: dict[str, Agreed]


class Part(Axes):
    """How well the choice from a part of the text agrees with that from all of it."""

    tokens: Count


class Drawn(Checked):
    """How well the choices of several draws agree on one axis."""

    rank_correlation: Number
    jaccard: Number


class Stable(Checked):
    """How stable the choice of one criterion is."""

    tokens: list[Part]
    enough: Count | None
    draws: dict[str, Drawn] = {}
    float: Axes = None  # may be left out, but not null


class Mean(Checked):
    """Mean and standard deviation over several draws."""

    mean: Number
    stdev: Number


class Cost(Checked):
    """What the cuts from several draws cost."""

    criterion: str
    reconstructed: bool
    perplexity: Mean
    kl_divergence: Mean


class Stability(Checked):
    """stability.json."""

    criteria: dict[str, Stable]
    tokens: Count
    draw_tokens: list[Count]
    cost: Cost | None

    @model_validator(mode="after")
    def _complete(self) -> Stability:
        if self.cost and not self.draw_tokens:
            raise ValueError("draw_tokens is empty")
        axes = [{*of.tokens[0].axes} if of.tokens else set() for of in self.criteria.values()]
        for own, of in zip(axes, self.criteria.values(), strict=True):
            others = [set(part.axes) for part in of.tokens] + [
                set(x) for x in (of.draws, of.float and of.float.axes) if x
            ]
            if any(other != (own or other) for other in others):
                raise ValueError("an axis is missing")
        return self


class Trials(RootModel):
    """trials.json: the KL divergence of candidates, by a hash of everything that it depends on."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    root: dict[str, Number | None]


class Gate(Checked):
    """A rule for the result, and whether it holds; None: not measured."""

    rule: str
    stage: Literal["pruned", "recovered", "compared", "bench"]
    value: float | None
    limit: float | None
    ratio: float | None
    passed: bool | None


class Gates(Checked):
    """gates.json."""

    gates: list[Gate]


SCHEMAS: dict[str, type[BaseModel]] = {
    "size.json": Size, "tried.json": Tried, "layers.json": Layers, "done.json": Done, "check.json": Warned,
    "recovery.json": Recovery, "local.json": Healed, "bench.json": Bench, "export.json": Exported, "fits.json": Fits,
    "stability.json": Stability, "trials.json": Trials, "gates.json": Gates,
}  # fmt: skip
