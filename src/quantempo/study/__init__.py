"""The paper's tables and figures as independent, repeatable jobs: `quantempo study`.

`items/` says what to compare, `run_cell` how one comparison is made, `runner` who runs which,
`results` what follows from it. Not here: how it is drawn (`report`).
"""

from quantempo.study.base import STUDIES, Plan
from quantempo.study.main import make_plan, run_study
from quantempo.study.tools import Settings

__all__ = ["STUDIES", "Plan", "Settings", "make_plan", "run_study"]
