"""Toy simulators for Isaac Lab's own environments: a batched cart-pole, and a robot with four legs that falls over.

They have the attributes of the real assets, and state tensors that change in place as theirs do. Their physics are not
those of the real robots, so no measurement with them is valid for Isaac Sim.
"""

from __future__ import annotations

import contextlib
import enum
import math
import re
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

STARTUP_TERMS = ("physics_material", "add_base_mass", "base_com")  # they call PhysX
LEGS = ("LF", "LH", "RF", "RH")
FALLEN = 0.5  # rad of tilt at which the toy's base touches the ground


class ToySimulation:
    """Replaces SimulationContext. It steps the articulations of the scene."""

    class RenderMode(enum.IntEnum):
        """The members of SimulationContext.RenderMode."""

        NO_GUI_OR_RENDERING = -1
        NO_RENDERING = 0
        PARTIAL_RENDERING = 1
        FULL_RENDERING = 2

    render_mode = RenderMode.NO_GUI_OR_RENDERING
    current: ClassVar[ToySimulation | None] = None

    def __init__(self, cfg: Any) -> None:
        self.cfg, self.device, self.num_forwards, self.num_envs = cfg, cfg.device, 0, 0
        self.articulations: list[ToyArticulation] = []
        self._playing = False
        ToySimulation.current = self

    @classmethod
    def instance(cls) -> ToySimulation | None:
        return cls.current

    @classmethod
    def clear_instance(cls) -> None:
        cls.current = None

    def step(self, render: bool = True) -> None:
        for articulation in self.articulations:
            articulation.advance(self.cfg.dt)

    def forward(self) -> None:
        self.num_forwards += 1

    def has_gui(self) -> bool:
        return False

    def has_rtx_sensors(self) -> bool:
        return False

    def get_initial_stage(self) -> None:
        return None

    def reset(self) -> None:
        """Start playing. The real one also creates handles of the physics engine."""
        self._playing = True

    def is_playing(self) -> bool:
        return self._playing

    render = stop = clear = clear_all_callbacks = get_initial_stage


class ToyArticulation:
    """Joints on which torques act. Subclasses define how they move."""

    joint_names: ClassVar[list[str]] = []
    body_names: ClassVar[list[str]] = []
    is_initialized = True

    def __init__(self, num_envs: int, device: str) -> None:
        self.num_instances, self.device = num_envs, device
        self._ALL_INDICES = torch.arange(num_envs, device=device)
        joints, self.num_joints, self.num_bodies = len(self.joint_names), len(self.joint_names), len(self.body_names)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_envs, *shape, device=device)

        self.data = SimpleNamespace(
            joint_pos=zeros(joints),
            joint_vel=zeros(joints),
            joint_acc=zeros(joints),
            applied_torque=zeros(joints),
            default_joint_pos=zeros(joints),
            default_joint_vel=zeros(joints),
            soft_joint_pos_limits=torch.tensor([-3.2, 3.2], device=device).expand(num_envs, joints, 2).clone(),
            soft_joint_vel_limits=zeros(joints) + 100.0,
            default_root_state=zeros(13),
            root_pos_w=zeros(3),
            root_quat_w=zeros(4),
            root_vel_w=zeros(6),
            root_lin_vel_b=zeros(3),
            root_ang_vel_b=zeros(3),
            projected_gravity_b=zeros(3),
            heading_w=zeros(),
        )
        self.data.root_quat_w[:, 0] = self.data.default_root_state[:, 3] = 1.0
        self.effort, self.target = zeros(joints), zeros(joints)
        self.permanent_wrench_composer = SimpleNamespace(set_forces_and_torques=lambda *args, **kwargs: None)

    def _find(self, names: list[str], keys: Any, preserve_order: bool) -> tuple[list[int], list[str]]:
        keys = [keys] if isinstance(keys, str) else list(keys)
        found = [i for i, name in enumerate(names) if any(re.fullmatch(key, name) for key in keys)]
        return found, [names[i] for i in found]

    def find_joints(self, name_keys: Any, joint_subset: Any = None, preserve_order: bool = False) -> tuple:
        return self._find(self.joint_names, name_keys, preserve_order)

    def find_bodies(self, name_keys: Any, preserve_order: bool = False) -> tuple:
        return self._find(self.body_names, name_keys, preserve_order)

    def set_joint_effort_target(self, target: Tensor, joint_ids: Any = slice(None), env_ids: Any = None) -> None:
        self.effort[:, joint_ids] = target

    def set_joint_position_target(self, target: Tensor, joint_ids: Any = slice(None), env_ids: Any = None) -> None:
        self.target[:, joint_ids] = target

    def write_joint_state_to_sim(
        self, position: Tensor, velocity: Tensor, joint_ids: Any = None, env_ids: Any = None
    ) -> None:
        rows = self._ALL_INDICES if env_ids is None else env_ids
        columns = torch.arange(self.num_joints) if joint_ids is None or isinstance(joint_ids, slice) else joint_ids
        index = (rows[:, None], torch.as_tensor(columns)[None, :])
        self.data.joint_pos[index], self.data.joint_vel[index] = position, velocity

    def write_root_pose_to_sim(self, root_pose: Tensor, env_ids: Any = None) -> None:
        rows = self._ALL_INDICES if env_ids is None else env_ids
        self.data.root_pos_w[rows], self.data.root_quat_w[rows] = root_pose[:, :3], root_pose[:, 3:]

    def write_root_velocity_to_sim(self, root_velocity: Tensor, env_ids: Any = None) -> None:
        self.data.root_vel_w[self._ALL_INDICES if env_ids is None else env_ids] = root_velocity

    def reset(self, env_ids: Any = None) -> None:
        rows = slice(None) if env_ids is None else env_ids
        self.effort[rows] = 0
        self.target[rows] = self.data.default_joint_pos[rows]

    def advance(self, dt: float) -> None:
        raise NotImplementedError


class ToyCartpole(ToyArticulation):
    joint_names: ClassVar[list[str]] = ["slider_to_cart", "cart_to_pole"]
    body_names: ClassVar[list[str]] = ["slider", "cart", "pole"]

    def advance(self, dt: float) -> None:
        data = self.data
        push = self.effort[:, 0].clamp(-400, 400)
        data.joint_acc[:, 0] = push / 2.0 - 0.1 * data.joint_vel[:, 0]
        data.joint_acc[:, 1] = (
            9.81 * data.joint_pos[:, 1].sin() - 0.5 * data.joint_acc[:, 0] * data.joint_pos[:, 1].cos()
        )
        data.applied_torque[:, 0] = push
        data.joint_vel += dt * data.joint_acc
        data.joint_pos += dt * data.joint_vel


class ToyQuadruped(ToyArticulation):
    """Twelve joints with PD control. Bent legs tilt the base, and gravity tilts it further."""

    joint_names: ClassVar[list[str]] = [f"{leg}_{joint}" for joint in ("HAA", "HFE", "KFE") for leg in LEGS]
    body_names: ClassVar[list[str]] = [
        "base",
        *(f"{leg}_{b}" for b in ("HIP", "THIGH", "SHANK", "FOOT") for leg in LEGS),
    ]

    def __init__(self, num_envs: int, device: str) -> None:
        super().__init__(num_envs, device)
        bend = {"HAA": 0.0, "HFE": 0.4, "KFE": -0.8}
        for index, name in enumerate(self.joint_names):
            sign = -1.0 if name[1] == "H" else 1.0
            self.data.default_joint_pos[:, index] = sign * bend[name[3:]]
        self.data.default_root_state[:, 2] = 0.6
        self.tilt, self.tilt_vel = torch.zeros(num_envs, 2, device=device), torch.zeros(num_envs, 2, device=device)

    def reset(self, env_ids: Any = None) -> None:
        super().reset(env_ids)
        rows = slice(None) if env_ids is None else env_ids
        self.tilt[rows] = self.tilt_vel[rows] = 0

    def advance(self, dt: float) -> None:
        data = self.data
        torque = (60 * (self.target - data.joint_pos) - 2 * data.joint_vel).clamp(-80, 80)
        data.applied_torque.copy_(torque)
        data.joint_acc.copy_(torque / 0.2)
        data.joint_vel += dt * data.joint_acc
        data.joint_pos += dt * data.joint_vel
        bent = (data.joint_pos - data.default_joint_pos).view(-1, 3, 4)
        lean = torch.stack([bent[:, 0].mean(-1), bent[:, 1:].mean((1, 2))], -1)
        self.tilt_vel += dt * (12 * self.tilt.sin() + 25 * lean - 0.5 * self.tilt_vel)
        self.tilt += dt * self.tilt_vel
        data.root_vel_w[:, 0] += dt * (4 * lean[:, 1] - data.root_vel_w[:, 0])
        data.root_vel_w[:, 1:] -= dt * data.root_vel_w[:, 1:]
        data.root_pos_w += dt * data.root_vel_w[:, :3]
        self._derive()

    def _derive(self) -> None:
        data = self.data
        roll, pitch = self.tilt.unbind(-1)
        data.projected_gravity_b[:, 0], data.projected_gravity_b[:, 1] = pitch.sin(), -roll.sin()
        data.projected_gravity_b[:, 2] = -roll.cos() * pitch.cos()
        w, x, y, z = data.root_quat_w.unbind(-1)
        data.heading_w.copy_(torch.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))
        data.root_lin_vel_b.copy_(data.root_vel_w[:, :3])
        data.root_ang_vel_b[:, :2], data.root_ang_vel_b[:, 2] = self.tilt_vel, data.root_vel_w[:, 5]


class ToyContactSensor:
    """Reports a force on the base if it has fallen, and contacts of the feet that depend on the knees."""

    def __init__(self, robot: ToyQuadruped) -> None:
        self._robot, self.body_names, self.num_bodies = robot, robot.body_names, robot.num_bodies
        shape = robot.num_instances, robot.num_bodies
        self.data = SimpleNamespace(
            net_forces_w_history=torch.zeros(shape[0], 3, shape[1], 3, device=robot.device),
            last_air_time=torch.zeros(shape, device=robot.device),
        )
        self.find_bodies = robot.find_bodies

    def compute_first_contact(self, dt: float) -> Tensor:
        return self.data.last_air_time > 0

    def update(self) -> None:
        history = self.data.net_forces_w_history
        history[:, 1:] = history[:, :-1].clone()
        history[:, 0] = 0
        history[:, 0, 0, 2] = torch.where(self._robot.tilt.abs().amax(-1) > FALLEN, 400.0, 0.0)
        feet = [index for index, name in enumerate(self.body_names) if name.endswith("FOOT")]
        self.data.last_air_time[:, feet] = self._robot.data.joint_pos[:, -4:].abs() / 4

    def reset(self, env_ids: Any) -> None:
        self.data.net_forces_w_history[env_ids] = 0


class ToyScene:
    """Replaces InteractiveScene. It has the cart-pole, or the quadruped if the configuration has contact sensors."""

    def __init__(self, cfg: Any) -> None:
        self.cfg, self.num_envs = cfg, cfg.num_envs
        simulation = ToySimulation.current
        assert simulation is not None, "the environment creates its simulation before its scene"
        self._simulation, simulation.num_envs = simulation, cfg.num_envs
        rows = torch.arange(self.num_envs, device=simulation.device)
        side = math.ceil(math.sqrt(self.num_envs))
        self.env_origins = torch.stack([rows // side, rows % side, 0 * rows], -1) * cfg.env_spacing
        self.articulations: dict[str, ToyArticulation] = {}
        self.sensors: dict[str, ToyContactSensor] = {}
        if hasattr(cfg, "contact_forces"):
            robot = ToyQuadruped(self.num_envs, simulation.device)
            self.articulations["robot"], self.sensors["contact_forces"] = robot, ToyContactSensor(robot)
        elif hasattr(cfg, "robot"):
            self.articulations["robot"] = ToyCartpole(self.num_envs, simulation.device)

    def __getitem__(self, key: str) -> Any:
        return {**self.articulations, **self.sensors}[key]

    def keys(self) -> list[str]:
        return [*self.articulations, *self.sensors]

    def write_data_to_sim(self) -> None:
        self._simulation.articulations = list(self.articulations.values())

    def update(self, dt: float) -> None:
        for sensor in self.sensors.values():
            sensor.update()

    def reset(self, env_ids: Any = None) -> None:
        for entity in (*self.articulations.values(), *self.sensors.values()):
            entity.reset(env_ids)

    def clone_environments(self, copy_from_source: bool = False) -> None:
        """There is nothing to do, because all environments are one batch."""

    def filter_collisions(self, global_prim_paths: Any = None) -> None:
        """There is nothing to do, because nothing collides."""


def replace_simulator(module: ModuleType) -> None:
    """Replace the simulator's names in a module of an environment by the toy's."""
    replaced: Any = module
    if module.__name__.endswith("direct.cartpole.cartpole_env"):
        from isaacsim import Anything

        replaced.Articulation = _make_cartpole
        replaced.spawn_ground_plane = lambda **kwargs: None
        replaced.sim_utils = Anything
        return
    replaced.SimulationContext, replaced.InteractiveScene = ToySimulation, ToyScene
    replaced.use_stage = lambda stage: contextlib.nullcontext()
    replaced.attach_stage_to_usd_context = lambda *args, **kwargs: None
    real = replaced.EventManager

    def event_manager(cfg: Any, env: Any) -> Any:
        for name in STARTUP_TERMS:
            if hasattr(cfg, name):
                setattr(cfg, name, None)
        for command in vars(getattr(env.cfg, "commands", None) or SimpleNamespace()).values():
            if hasattr(command, "debug_vis"):
                command.debug_vis = False
        return real(cfg, env)

    replaced.EventManager = event_manager


def _make_cartpole(cfg: Any) -> ToyCartpole:
    """Create the cart-pole, as a direct task does itself."""
    assert ToySimulation.current is not None
    return ToyCartpole(ToySimulation.current.num_envs, ToySimulation.current.device)
