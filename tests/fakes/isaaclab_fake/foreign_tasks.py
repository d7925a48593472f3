"""Somebody's own package of tasks, which only an import registers."""

from isaaclab_tasks import register  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

register("Foreign-Manager-v0", "ManagerEnv")
