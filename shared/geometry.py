"""The sizes that follow from the settings, and the checks of settings that must fit each other.

Users choose sizes freely. A run works with whole ticks, whole chunks and whole windows, so some sizes are rounded:

    tick     one step of all E environments
    chunk    K ticks, which travel to the learner together: K * E agent steps
    ring     the replay, T_cap rows for each environment; T_cap is a multiple of K
    prefill  the chunks that are collected before the first gradient step
    batch    B windows of L consecutive rows each
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.config import Settings
from shared.errors import SettingError


@dataclass(frozen=True)
class Geometry:
    """The sizes of a run, rounded to whole ticks, chunks and windows."""

    num_envs: int  # E
    num_replayed: int  # environments whose rows are sampled
    ticks_per_chunk: int  # K
    capacity: int  # T_cap, in rows for each environment
    prefill_chunks: int
    num_sequences: int  # B
    sequence_length: int  # L

    @staticmethod
    def of(settings: Settings, num_envs: int | None = None) -> Geometry:
        """Return the sizes for a number of environments, by default the number that the settings choose."""
        collector, replay = settings.collector, settings.replay_buffer
        envs = count_envs(settings) if num_envs is None else num_envs
        ticks = max(1, round(collector.frames_per_batch / envs))
        return Geometry(
            num_envs=envs,
            num_replayed=envs if collector.eval_in_replay else envs - collector.eval_envs,
            ticks_per_chunk=ticks,
            capacity=replay.buffer_size // envs // ticks * ticks,
            prefill_chunks=math.ceil(collector.init_random_frames / (ticks * envs)),
            num_sequences=replay.batch_size // replay.batch_length,
            sequence_length=replay.batch_length,
        )

    @property
    def frames_per_chunk(self) -> int:
        """Return the agent steps in a chunk, K * E."""
        return self.ticks_per_chunk * self.num_envs

    @property
    def replayed_per_chunk(self) -> int:
        """Return the agent steps in a chunk that can be sampled."""
        return self.ticks_per_chunk * self.num_replayed

    @property
    def replayed_prefill(self) -> int:
        """Return the agent steps of the prefill that can be sampled."""
        return self.prefill_chunks * self.replayed_per_chunk

    @property
    def frames_per_step(self) -> int:
        """Return the agent steps in the batch of one gradient step, B * L."""
        return self.num_sequences * self.sequence_length

    @property
    def prefill_frames(self) -> int:
        """Return the agent steps that are collected before the first gradient step."""
        return self.prefill_chunks * self.frames_per_chunk


def count_envs(settings: Settings) -> int:
    """Return E, the number of environments.

    It is env.num_envs. If that is null, the simulator has worker processes, and E is their number (0 counts as 1)
    times the environments of each.
    """
    if settings.env.num_envs is not None:
        return settings.env.num_envs
    return max(1, settings.collector.num_collectors) * settings.env.n_parallel_envs


def geometry_notes(settings: Settings) -> list[str]:
    """Return one line for each size that is rounded."""
    geometry, collector, replay = Geometry.of(settings), settings.collector, settings.replay_buffer
    envs, buffer_size = geometry.num_envs, geometry.capacity * geometry.num_envs
    notes = []
    if geometry.frames_per_chunk != collector.frames_per_batch:
        notes.append(
            f"collector.frames_per_batch={collector.frames_per_batch} becomes {geometry.frames_per_chunk}: "
            f"{geometry.ticks_per_chunk} ticks of {envs} environments"
        )
    if buffer_size != replay.buffer_size:
        notes.append(
            f"replay_buffer.buffer_size={replay.buffer_size} becomes {buffer_size}: {geometry.capacity} rows "
            f"({geometry.capacity // geometry.ticks_per_chunk} chunks) for each of {envs} environments"
        )
    if geometry.prefill_frames != collector.init_random_frames:
        notes.append(
            f"collector.init_random_frames={collector.init_random_frames} becomes {geometry.prefill_frames}: "
            f"{geometry.prefill_chunks} whole chunks"
        )
    return notes


def check_settings(settings: Settings) -> None:
    """Check that the settings fit each other. It needs neither a GPU nor a simulator.

    Raises: SettingError for the first settings that do not.
    """
    geometry = Geometry.of(settings)
    _check_lockstep(settings)
    _check_actor_std(settings)
    _check_eval_envs(settings, geometry)
    _check_batch(settings)
    _check_starts(settings)
    _check_ring(settings, geometry)
    _check_prefill(settings, geometry)


def _check_lockstep(settings: Settings) -> None:
    if settings.collector.mode == "lockstep" and settings.optimization.replay_ratio is None:
        raise SettingError(
            "collector.mode=lockstep with optimization.replay_ratio=null, so the learner's turn would never end; "
            "expected a number; set optimization.replay_ratio=64 or collector.mode=async"
        )


def _check_actor_std(settings: Settings) -> None:
    lowest, first = settings.networks.actor_min_std, settings.networks.init_std
    if lowest > first:
        raise SettingError(
            f"networks.actor_min_std={lowest} is above networks.init_std={first}, with which the actor starts; "
            f"expected at most {first}; lower it, or raise networks.init_std"
        )


def _check_eval_envs(settings: Settings, geometry: Geometry) -> None:
    eval_envs = settings.collector.eval_envs
    if eval_envs >= geometry.num_envs:
        raise SettingError(
            f"collector.eval_envs={eval_envs} leaves none of the {geometry.num_envs} environments for training; "
            f"expected fewer than {geometry.num_envs}; lower it or raise the number of environments"
        )


def _check_batch(settings: Settings) -> None:
    size, length = settings.replay_buffer.batch_size, settings.replay_buffer.batch_length
    if size < length or size % length:
        nearest = max(1, round(size / length)) * length
        raise SettingError(
            f"replay_buffer.batch_size={size} is not a whole number of windows of replay_buffer.batch_length={length}; "
            f"expected a multiple of {length}; set replay_buffer.batch_size={nearest}"
        )


def _check_starts(settings: Settings) -> None:
    starts, size = settings.optimization.imagination_starts, settings.replay_buffer.batch_size
    if starts is not None and starts > size:
        raise SettingError(
            f"optimization.imagination_starts={starts} is more than the replay_buffer.batch_size={size} agent steps of "
            f"a batch; expected at most {size}; lower it, or set it to null for all of them"
        )


def _check_ring(settings: Settings, geometry: Geometry) -> None:
    envs, ticks, length = geometry.num_envs, geometry.ticks_per_chunk, geometry.sequence_length
    # Up to two chunks are granted to the collector and cannot be sampled. The rest must contain a whole window.
    lowest = math.ceil((length + 2 * ticks) / ticks) * ticks
    if geometry.capacity < lowest:
        raise SettingError(
            f"replay_buffer.buffer_size={settings.replay_buffer.buffer_size} holds {geometry.capacity} rows for each "
            f"of {envs} environments, fewer than a window and two chunks ({length} + 2 * {ticks} rows); expected at "
            f"least {lowest} rows; raise it to at least {lowest * envs} or lower the number of environments"
        )


def _check_prefill(settings: Settings, geometry: Geometry) -> None:
    frames, envs, length = settings.collector.init_random_frames, geometry.num_envs, geometry.sequence_length
    rows = geometry.prefill_chunks * geometry.ticks_per_chunk
    if rows < length:
        raise SettingError(
            f"collector.init_random_frames={frames} fills {rows} rows for each of {envs} environments before the first "
            f"gradient step, fewer than replay_buffer.batch_length={length}; expected at least {length} rows; "
            f"raise it to at least {length * envs}"
        )
    if rows > geometry.capacity:
        raise SettingError(
            f"collector.init_random_frames={frames} is a prefill of {geometry.prefill_frames} agent steps, more than "
            f"the {geometry.capacity * envs} that replay_buffer.buffer_size={settings.replay_buffer.buffer_size} "
            "holds; expected a prefill that fits; lower it or raise replay_buffer.buffer_size"
        )
