"""What a recipe will need: memory, time and cost, before it runs. No weights are read."""

from vistune.plan.make import Plan, make_plan, settle

__all__ = ["Plan", "make_plan", "settle"]
