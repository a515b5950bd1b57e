"""What a recipe will need: memory, time and cost, before it runs. No weights are read."""

from vistune.plan.held import Held, held
from vistune.plan.make import Plan, dtype_of, make_plan, settle, target_of

__all__ = ["Held", "Plan", "dtype_of", "held", "make_plan", "settle", "target_of"]
