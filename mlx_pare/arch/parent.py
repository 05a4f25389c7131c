"""Multimodal models: the language model inside is cut, the rest is kept untouched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Where the names of other parts begin that mlx-lm's classes drop (``sanitize`` of each)
TOWERS = ("vision_tower", "multi_modal_projector")
VISUAL = ("visual", "vision_tower")


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model type: which language model is inside, and how its tensors are named.

    ``model_type``: of the language model; None: its ``text_config`` says it. ``shared``: keys of the outer config that
    apply to it. ``bare``: the type is also used without a ``text_config``, for the language model alone. ``beside``:
    where the names of the other tensors begin; mlx-lm drops these.
    """

    model_type: str | None
    prefix: str = "language_model."
    defaults: Mapping[str, Any] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    bare: bool = False
    beside: tuple[str, ...] = TOWERS


@dataclass(frozen=True)
class Parent:
    """The model that a language model is a part of. ``config``: its whole config.json."""

    wrapper: Wrapper
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def unseen(self) -> str:
        """What people must know about a cut of it."""
        return (
            f"Only the language model of this {self.model_type} is cut. The other tensors are untouched. No picture or "
            "sound was used, so what the cut does to those is unknown."
        )

    def inner(self) -> dict[str, Any]:
        """The config of the language model alone."""
        own, wrapper = self._own(), self.wrapper
        shared = {key: self.config[key] for key in wrapper.shared if self.config.get(key) is not None}
        merged = {**wrapper.defaults, **own, **shared}
        return {**merged, "model_type": wrapper.model_type or merged.get("model_type")}

    def around(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the whole model with another language model of the same type. ``changed``: its keys."""
        if not isinstance(self.config.get("text_config"), dict):
            return {**self.config, **changed}
        return {**self.config, "text_config": {**self._own(), **changed}}

    def keeps(self, name: str) -> bool:
        """Whether a tensor is no part of the language model, and mlx-lm drops it."""
        return name.startswith(tuple(f"{first}." for first in self.wrapper.beside))

    def _own(self) -> dict[str, Any]:
        inner = self.config.get("text_config")
        return dict(inner) if isinstance(inner, dict) else {k: v for k, v in self.config.items() if k != "model_type"}
