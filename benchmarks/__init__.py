"""What is measured, against whom, with what result. Runs from a checkout: `carft_kernels` need not be installed."""

import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
sys.path.insert(0, str(KERNELS))
