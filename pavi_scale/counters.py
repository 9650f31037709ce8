"""The numbers that counters are mixed with, for arrays (`rng`) and in compiled loops (`quantile`), which only normals need."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LAST = 1.0 - 2.0**-53  # the largest uniform number
