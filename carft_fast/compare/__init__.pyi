from .runs import DEFAULT_METHODS as DEFAULT_METHODS
from .runs import compare as compare
from .runs import parse_methods as parse_methods
from .runs import parse_seeds as parse_seeds
