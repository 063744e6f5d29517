from .runs import DEFAULT_METHODS as DEFAULT_METHODS
from .runs import Comparison as Comparison
from .runs import expand as expand
from .runs import parse_methods as parse_methods
from .runs import parse_seeds as parse_seeds
from .runs import parse_vary as parse_vary
from .study import Study as Study
from .study import load_study as load_study
