"""Table 6: the runs of table 5, by IoU threshold.

    ghm-jax train experiments/paper/table6.py:ghm_r --data.dir data

`published` is the paper's AP on minival. Not measured here.

Estimated, not run: 7 hours per row on one A100 at an MFU of 30 %.
"""

import runpy
from pathlib import Path

configs = runpy.run_path(str(Path(__file__).with_name("table5.py")))["configs"]

published = {
    "smooth_l1": {"AP": 35.8, "AP50": 55.5, "AP60": 51.2, "AP70": 43.4, "AP80": 31.4, "AP90": 11.9},
    "asl1": {"AP": 35.7, "AP50": 55.0, "AP60": 51.1, "AP70": 43.5, "AP80": 31.5, "AP90": 12.1},
    "ghm_r": {"AP": 36.4, "AP50": 54.6, "AP60": 51.4, "AP70": 44.0, "AP80": 32.2, "AP90": 13.1},
}
