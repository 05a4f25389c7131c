"""Model families as data: describe(config) -> Architecture, and the Architecture that a cut leaves."""

from .cut import can_keep, cut, positions, require_cuttable
from .describe import RESULT_TYPES, describe, described_types, parent_of, supported_types
from .keep import Keep, LayerKeep
from .rope import both_rope_spellings, older_rope_spelling
from .spec import Architecture, Tensor
from .uneven import uneven_types, why_no_sublayer_drops, why_uniform

__all__ = [
    "RESULT_TYPES",
    "Architecture",
    "Keep",
    "LayerKeep",
    "Tensor",
    "both_rope_spellings",
    "can_keep",
    "cut",
    "describe",
    "described_types",
    "older_rope_spelling",
    "parent_of",
    "positions",
    "require_cuttable",
    "supported_types",
    "uneven_types",
    "why_no_sublayer_drops",
    "why_uniform",
]
