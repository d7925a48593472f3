"""The cells of the two scans: the RSSM along recorded steps, and the actor in the RSSM along imagined steps.

They compute what `RSSM.posterior_step` and `Imagination.step` compute, with fewer products in each step:

    - The GRU's recurrent layer and the layer that reads the new state have the same input. One product serves both,
      so the GRU's share is computed at the end of the step before:

          step t     h_t ──> [ W_recurrent ; W_next ] ──> W_next h_t        for the rest of step t
                                                     └──> W_recurrent h_t   carried to step t + 1

    - What recorded actions and observations add to a layer is known before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from learner_proc.imagination import Imagination, ImaginedStep
from learner_proc.products import Extra, Parts, Products
from learner_proc.scan import Scan
from shared.model.layers import GRU
from shared.model.rssm import RSSM, Belief, Posterior, stats

Compile = Callable[[Callable], Callable]


class Carried(NamedTuple):
    """A belief, and the recurrent product of its `deter` without bias: three parts (N, D), one for each gate."""

    deter: Tensor
    stoch: Tensor
    recurrent: Parts


class Step(NamedTuple):
    """What the next step takes, and what is stacked over all steps."""

    belief: Carried
    result: Posterior | ImaginedStep


class ObserveScan:
    """The RSSM's posterior steps along recorded windows."""

    def __init__(self, rssm: RSSM, *, dtype: torch.dtype, compiled: Compile) -> None:
        """dtype: of the matrix products; compiled: compiles a function, or returns it unchanged."""
        self._rssm = rssm
        weight = rssm.input.weight
        row = partial(weight.new_zeros, 1)
        num_known = {rssm.input: weight.shape[1] - rssm.stoch_dim}
        self._scan = Scan(
            self._step,
            _blank(rssm, weight),
            (row(1, dtype=torch.bool), row(rssm.stoch_dim)),
            dtype=dtype,
            compiled=compiled,
            select=_result,
            num_known=num_known,
        )

    def __call__(self, belief: Belief, inputs: Sequence[Tensor]) -> Posterior:
        """Return the posteriors (N, T, ...). Shapes: inputs as those of `RSSM.posterior_step`, with a leading T."""
        action, embed_share, is_first, noise = inputs
        rssm = self._rssm
        extra = {
            rssm.input: Extra(known=action.masked_fill(is_first, 0.0)),
            rssm.posterior_deter: Extra(share=embed_share),
        }
        begin = partial(_begin, rssm.gru, rssm.posterior_deter)
        return self._scan(belief, (is_first, noise), extra=extra, begin=begin)

    def _step(self, carried: Carried, is_first: Tensor, noise: Tensor, *, linear: Products) -> Step:
        """Shapes: is_first (N, 1) bool, noise (N, S)."""
        rssm = self._rssm
        x = rssm.activation(linear(rssm.input, carried.stoch.masked_fill(is_first, 0.0)))
        # Select, do not multiply by zero: 0 * NaN is NaN. The product of a state of zeros is zero.
        state = carried.deter.masked_fill(is_first, 0.0)
        recurrent = tuple(part.masked_fill(is_first, 0.0) for part in carried.recurrent)
        deter = _gru(rssm.gru, x, state, recurrent, linear)
        recurrent, posterior = linear.shared(deter, (rssm.gru.recurrent, 3), (rssm.posterior_deter, 1))
        (x,) = linear.add(rssm.posterior_deter, deter, posterior)
        mean, std = stats(*linear.parts(rssm.posterior_out, rssm.activation(x), 2))
        stoch = mean + std * noise
        return Step(Carried(deter, stoch, recurrent), Posterior(Belief(deter, stoch), mean, std))


class ImagineScan:
    """The steps of an imagination: the actor acts, and the RSSM's prior predicts what follows."""

    def __init__(self, imagination: Imagination, *, dtype: torch.dtype, compiled: Compile) -> None:
        """dtype: of the matrix products; compiled: compiles a function, or returns it unchanged."""
        self._imagination = imagination
        rssm, actor = imagination.rssm, imagination.actor
        weight = rssm.input.weight
        row = partial(weight.new_zeros, 1)
        inputs = (row(actor.action_dim), row(rssm.stoch_dim))
        self._scan = Scan(self._step, _blank(rssm, weight), inputs, dtype=dtype, compiled=compiled, select=_result)

    def __call__(self, belief: Belief, inputs: Sequence[Tensor]) -> ImaginedStep:
        """Return the imagined steps (N, T, ...). Shapes: inputs as those of `Imagination.step`, with a leading T."""
        rssm = self._imagination.rssm
        return self._scan(belief, inputs, begin=partial(_begin, rssm.gru, rssm.prior_hidden))

    def _step(self, carried: Carried, action_noise: Tensor, noise: Tensor, *, linear: Products) -> Step:
        """Shapes: action_noise (N, A), noise (N, S)."""
        rssm, actor = self._imagination.rssm, self._imagination.actor
        first, *hidden, last = actor.layers
        x = linear(cast(nn.Linear, first), carried.stoch.detach(), carried.deter.detach())
        for layer in hidden:
            x = linear(layer, x) if isinstance(layer, nn.Linear) else layer(x)
        action_mean, action_std = actor.stats(*linear.parts(cast(nn.Linear, last), x, 2))
        action = torch.tanh(action_mean + action_std * action_noise)
        x = rssm.activation(linear(rssm.input, carried.stoch, action))
        deter = _gru(rssm.gru, x, carried.deter, carried.recurrent, linear)
        recurrent, prior = linear.shared(deter, (rssm.gru.recurrent, 3), (rssm.prior_hidden, 1))
        (x,) = linear.add(rssm.prior_hidden, deter, prior)
        mean, std = stats(*linear.parts(rssm.prior_out, rssm.activation(x), 2))
        stoch = mean + std * noise
        kept = self._imagination.kept(action_mean, action_std)
        return Step(Carried(deter, stoch, recurrent), ImaginedStep(Belief(deter, stoch), *kept))


def _gru(gru: GRU, x: Tensor, state: Tensor, recurrent: Parts, linear: Products) -> Tensor:
    """Return the next state, as `GRU.forward` does. recurrent: the recurrent product of `state`, without bias."""
    reset_x, update_x, candidate_x = (part.float() for part in linear.parts(gru.input, x, 3))
    reset_h, update_h, candidate_h = linear.add(gru.recurrent, state, recurrent)
    reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
    candidate = torch.tanh(candidate_x + reset * candidate_h)
    return torch.lerp(candidate, state, update)


def _blank(rssm: RSSM, weight: Tensor) -> Carried:
    belief = rssm.initial(1)
    return Carried(*belief, tuple(weight.new_zeros(1, rssm.deter_dim) for _ in range(3)))


def _begin(gru: GRU, other: nn.Linear, belief: Belief, shared: Callable[..., list[Parts]]) -> Carried:
    """Return what the first step takes. other: the layer that shares the input of the GRU's recurrent layer."""
    recurrent, _ = shared(belief.deter, (gru.recurrent, 3), (other, 1))
    return Carried(*belief, recurrent)


def _result(step: Step) -> Posterior | ImaginedStep:
    return step.result
