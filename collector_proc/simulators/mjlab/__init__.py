"""mjlab: MuJoCo Warp with Isaac Lab's manager interface."""
