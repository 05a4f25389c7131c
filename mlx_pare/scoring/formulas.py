"""The formulas by the names that the criteria of score.py give them, for each axis."""

from __future__ import annotations

from . import depth, expert, width

FFN = {
    "minitron": width.minitron_ffn,
    "magnitude": width.magnitude_ffn,
    "wanda": width.wanda_ffn,
    "flap": width.flap_ffn,
    "composite": width.composite_ffn,
    "taylor": width.taylor_ffn,
    "taylor2": width.taylor2_ffn,
    "iterative": width.iterative_ffn,
    "random": width.random_ffn,
}
HEADS = {
    "minitron": width.minitron_heads,
    "magnitude": width.magnitude_heads,
    "wanda": width.wanda_heads,
    "flap": width.flap_heads,
    "composite": width.composite_heads,
    "taylor": width.taylor_heads,
    "taylor2": width.taylor2_heads,
    "iterative": width.iterative_heads,
    "random": width.random_heads,
}
HIDDEN = {
    "minitron": width.minitron_hidden,
    "magnitude": width.magnitude_hidden,
    "wanda": width.wanda_hidden,
    "composite": width.composite_hidden,
    "random": width.random_hidden,
}
LAYER = {
    "block_influence": depth.block_influence,
    "angular": depth.angular,
    "magnitude": depth.magnitude,
    "taylor": depth.taylor,
    "taylor2": depth.taylor2,
    "random": depth.random,
}
EXPERT = expert.FORMULAS
