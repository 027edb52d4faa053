"""Study of a dense ViT and the six routers, head to head on real images."""

import vmoe_routers.models  # noqa: F401  # first: its error says what to install in place of a broken torchvision
from vmoe_routers.study.ablation_rows import ablation_rows
from vmoe_routers.study.claims import decide
from vmoe_routers.study.compare import compare_studies
from vmoe_routers.study.folders import read_runs
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.study import report_study, run_study
from vmoe_routers.study.summary import summarise
from vmoe_routers.study.variants import Variant, variants

__all__ = [
    "Settings",
    "Variant",
    "ablation_rows",
    "compare_studies",
    "decide",
    "read_runs",
    "report_study",
    "run_study",
    "summarise",
    "variants",
]
