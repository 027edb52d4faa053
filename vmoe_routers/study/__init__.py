"""Study of a dense ViT and the six routers, head to head on real images."""

from vmoe_routers.study.compare import compare_studies
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.study import run_study
from vmoe_routers.study.variants import Variant, variants

__all__ = ["Settings", "Variant", "compare_studies", "run_study", "variants"]
