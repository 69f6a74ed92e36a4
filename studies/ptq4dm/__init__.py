"""The paper's tables and figures as independent, repeatable jobs: `python -m studies.ptq4dm`.

`items/` says what to compare, `run_cell` how one comparison is made, `runner` who runs which,
`results` what follows from it. Not here: how it is drawn (`report`).
"""

from studies.ptq4dm.base import STUDIES, Plan
from studies.ptq4dm.main import make_plan, run_study
from studies.ptq4dm.tools import Settings

__all__ = ["STUDIES", "Plan", "Settings", "make_plan", "run_study"]
