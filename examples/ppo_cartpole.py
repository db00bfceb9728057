"""Balance a pole whose velocities are hidden: PPO with episodes that end within a rollout.

A cart, pushed left or right, F = -10 or 10, must keep the pole on it upright (Barto, Sutton &
Anderson 1983; constants of gymnasium's CartPole-v1; M: total mass, m: pole mass, l: half length):

    M x'' + m l theta'' cos(theta) = F + m l theta'^2 sin(theta)      Euler steps of 0.02 s
    4/3 l theta'' + x'' cos(theta) = g sin(theta)                     reward: 1 per step (scaled)

An episode ends with a fall (too far out or tilted) or after 500 steps; a mean of 475 is "solved".
The velocities, hidden in o_t = (x, theta), require memory; "feed-forward" has none.

    h_t = LSTM(o_t, h_{t-1}) or tanh(W o_t + b)     p(right) = sigmoid(w h_t + b), V_t = u h_t + c
    delta_t = r_t + gamma V_{t+1} - V_t             A_t = delta_t + gamma lambda A_{t+1}
    loss = mean(-min(q A, clip(q, 0.8, 1.2) A) + (A + V_old - V)^2 / 2)       q = p(a) / p_old(a)

Schulman et al. 2017, arXiv:1707.06347 (PPO), 2016, arXiv:1506.02438 (A). V_{t+1} is 0 after a fall,
V_t after step 500. torch.nn has no resets, only CleanRL's loop (ppo_atari_lstm.py); both are timed.
"""

from __future__ import annotations

import argparse
from collections import namedtuple
from typing import Any

import torch
from common import COLOURS, Runs, Training, new_figure, run, seconds_each, trainer, update
from matplotlib.figure import Figure
from torch import Tensor

import fastrnn

GRAVITY, POLE, BOTH, HALF, FORCE, TAU = 9.8, 0.1, 1.1, 0.5, 10.0, 0.02
FAR, TILTED, LIMIT, REWARD, GAMMA, LAMBDA = 2.4, torch.pi / 15, 500, 0.03, 0.99, 0.95
# (T, B, ...) each; `lengths` is nonzero where an episode ends; `state` is that before step 0.
Rollout = namedtuple("Rollout", "x starts right log_prob target lengths advantage state")


class CartPoles:
    def __init__(self, count: int, device: str) -> None:
        self.state = torch.zeros(4, 1, count, device=device)
        self.age = self.state[0] + LIMIT - 1
        self.step(self.age)  # ends all episodes

    def step(self, right: Tensor) -> Tensor:
        """Return the lengths of episodes that end, elsewhere 0; the next ones start immediately."""
        _, v, theta, omega = self.state
        cos, sin, force = theta.cos(), theta.sin(), FORCE * (2 * right - 1)
        push = (force + POLE * HALF * omega**2 * sin) / BOTH
        alpha = (GRAVITY * sin - cos * push) / (HALF * (4 / 3 - POLE * cos**2 / BOTH))
        change = torch.stack([v, push - POLE * HALF * alpha * cos / BOTH, omega, alpha])
        state, age = self.state + TAU * change, self.age + 1
        self.start = (state[0].abs() > FAR) | (state[2].abs() > TILTED) | (age == LIMIT)
        fresh = torch.rand(state.shape).to(state.device) * 0.1 - 0.05
        self.state, self.age = fresh.where(self.start, state), age * ~self.start
        self.x = torch.stack([self.state[0] / FAR, self.state[2] / TILTED], dim=2)
        return age * self.start


class Policy(torch.nn.Sequential):
    def forward(self, x: Tensor, state: Any, starts: Tensor) -> tuple[Any, Tensor, Any]:
        if isinstance(self[0], torch.nn.Linear):
            h = self[0](x).tanh()
        elif isinstance(self[0], fastrnn.LSTM):
            h, state = self[0](x, state, reset=starts)
        else:
            outputs = []
            for one, keep in zip(x, 1 - starts[:, None, :, None].float(), strict=True):
                output, state = self[0](one[None], (keep * state[0], keep * state[1]))
                outputs.append(output)
            h = torch.cat(outputs)
        logits, value = self[1](h).unbind(2)
        return torch.distributions.Bernoulli(logits=logits, validate_args=False), value, state

    @torch.no_grad()
    def play(self, env: CartPoles, before: Any, steps: int, luck: float = 1.0) -> Any:
        taken, state = [], before
        for _ in range(steps):
            p, value, state = self(env.x, state, env.start)
            right = 1.0 * (p.probs > 0.5 + luck * (torch.rand(value.shape) - 0.5).to(value.device))
            taken.append((env.x, env.start, right, p.log_prob(right), value, env.step(right)))
        *parts, value, lengths = map(torch.cat, zip(*taken, strict=True))
        last = self(env.x, state, env.start)[1]
        following = torch.cat([value[1:], last]).where(lengths == 0, value) * (lengths % LIMIT == 0)
        advantage = REWARD + GAMMA * following - value
        for t in reversed(range(steps - 1)):
            advantage[t] += GAMMA * LAMBDA * (lengths[t] == 0) * advantage[t + 1]
        return Rollout(*parts, value + advantage, lengths, advantage, before), state

    def loss(self, old: Rollout) -> Tensor:
        p, value, _ = self(old.x, old.state, old.starts)
        q = (p.log_prob(old.right) - old.log_prob).exp()
        a = (old.advantage - old.advantage.mean()) / (old.advantage.std() + 1e-8)
        return (0.5 * (old.target - value) ** 2 - torch.min(q * a, q.clamp(0.8, 1.2) * a)).mean()


def compare(policy: Policy, old: Rollout, device: str) -> dict[str, float]:
    """Check that the loop over steps gives the same numbers, and time both variants."""
    policies = Policy(policy[0].to_torch(), policy[1]), policy

    def both(policy: Policy) -> tuple[Tensor, ...]:
        value = policy(old.x, old.state, old.starts)[1]
        return value, *torch.autograd.grad(value.square().sum(), list(policy[0].parameters()))

    for a, b in zip(*map(both, policies), strict=True):  # gradients are sums over all steps
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())
    loop, call = seconds_each(device, 7, *(lambda one=one: both(one) for one in policies))
    return {"ms by loop": loop * 1e3, "ms by reset=": call * 1e3}


def train(library: Any, variant: str, args: argparse.Namespace) -> Training:
    body = library.LSTM(2, args.hidden) if variant == "lstm" else torch.nn.Linear(2, args.hidden)
    policy = Policy(body, torch.nn.Linear(args.hidden, 2)).to(args.device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    env, ended, returns = CartPoles(args.envs, args.device), [], []
    state: Any = tuple(torch.zeros(2, 1, args.envs, args.hidden, device=args.device))
    for _ in range(args.updates):
        rollout, state = policy.play(env, state, args.steps)
        yield torch.stack([update(policy.loss(rollout), optimizer, 0.5) for _ in range(6)]).mean()
        ended = [*ended, *rollout.lengths[rollout.lengths > 0].tolist()][-100:]
        returns.append(sum(ended) / max(len(ended), 1))
    test, _ = policy.play(CartPoles(args.envs, args.device), state, LIMIT, luck=0)
    lengths = (test.starts.cumsum(0) == 1).sum(0)  # of the first episodes
    times = compare(policy, rollout, args.device) if isinstance(body, fastrnn.LSTM) else {}
    angle = (test.x[: lengths[0], 0, 1] * 12).tolist()
    return {"return": lengths.double().mean().item(), **times, "returns": returns, "angle": angle}


def draw(runs: Runs) -> Figure:
    figure, (left, right) = new_figure(1, 2, width=10)
    for variant, libraries in runs.items():
        of, color = libraries["fastrnn"], COLOURS.get(variant, "0.5")
        left.plot(of["returns"], color=color, label=f"{variant}, in the end {of['return']:.0f}")
        right.plot(of["angle"], color=color)
    left.axhline(475, color="0.3", linewidth=0.8, linestyle=":", label="solved")
    left.set(title="Return, mean of 100 episodes", xlabel="rollout")
    left.legend(loc="lower right", bbox_to_anchor=(1, 0.13))
    right.set(title="An episode after training", xlabel="step", ylabel="angle in degrees")
    figure.suptitle("Rollout: loop {ms by loop:.0f} ms, reset= {ms by reset=:.0f} ms".format(**of))
    return figure


def main(argv: list[str] | None = None) -> int:
    args = trainer(__doc__, updates=42, envs=64, steps=128, hidden=64, lr=1e-2).parse_args(argv)
    # Rounding can flip a sampled action and with it the game, so only beginnings are compared.
    return run(__file__, args, train, ["feed-forward", "lstm"], draw, first=4, loose=torch.inf)


if __name__ == "__main__":
    raise SystemExit(main())
