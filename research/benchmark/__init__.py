"""The cost of UBN compared with BatchNorm: time and memory of models and layers, scaling, and profiles.

All entries of a comparison alternate within one run, so that a drift of the machine affects them equally
(:mod:`.turns`). The benchmarks time whole models (:mod:`.models`), single layers (:mod:`.layers`) and layers of growing
size (:mod:`.growth`); :mod:`.profiles` profiles a step. Tables (:mod:`.tables`), plots (:mod:`.pictures`) and the page
``docs/speed.md`` (:mod:`.report`) are generated from the results.
"""

from .growth import AXES, RANKS, Fit, GrowthPoint, fit, grow, grow_ranks
from .layers import LAYER_MODES, LAYER_SHAPES, compare_layers
from .models import MODES, compare, compare_training
from .pictures import draw_growth, draw_ratios
from .profiles import GROUPS, Share, profile_step
from .report import page, report
from .tables import read_growth, read_profile, read_timings, rows_of, table, write_table
from .turns import KINDS, Timing, environment, keep_memory, peak_memory

__all__ = [
    "AXES",
    "GROUPS",
    "KINDS",
    "LAYER_MODES",
    "LAYER_SHAPES",
    "MODES",
    "RANKS",
    "Fit",
    "GrowthPoint",
    "Share",
    "Timing",
    "compare",
    "compare_layers",
    "compare_training",
    "draw_growth",
    "draw_ratios",
    "environment",
    "fit",
    "grow",
    "grow_ranks",
    "keep_memory",
    "page",
    "peak_memory",
    "profile_step",
    "read_growth",
    "read_profile",
    "read_timings",
    "report",
    "rows_of",
    "table",
    "write_table",
]
