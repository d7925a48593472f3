"""A user's package of tasks. Importing it registers them."""

from isaaclab_tasks import register  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

register("Foreign-Manager-v0", "ManagerEnv")
