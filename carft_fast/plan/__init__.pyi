from .gpus import GPUS as GPUS
from .gpus import MATMUL_SHARE as MATMUL_SHARE
from .gpus import MEMORY_SHARE as MEMORY_SHARE
from .gpus import Gpu as Gpu
from .report import estimate_table as estimate_table
from .report import verdict as verdict
from .resources import Estimate as Estimate
from .resources import estimate as estimate
