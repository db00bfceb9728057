"""Train a recurrent policy by PPO, with episodes that end inside of a rollout.

The environment shows a cue (+1 or -1) at an episode's first step and asks for it some steps later:
the right action is worth 1, the wrong one -1, and the next episode begins. Without a memory the
mean return is 0. Environments run side by side for T steps; then one call evaluates all of them,
with the state reset where an episode begins:

    output, state = lstm(x, state_before_the_rollout, reset=starts)

Loss: proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347) with generalized
advantages (Schulman et al. 2016, arXiv:1506.02438). torch.nn.LSTM has no resets: CleanRL's
ppo_atari_lstm.py calls it step by step and multiplies the state by 1 - done. At the end both are
compared: the same output and gradients, then the time.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from common import parser, save, seconds_each
from torch import Tensor
from torch.distributions import Categorical
from tqdm import trange

import fastrnn

GAMMA, LAMBDA, CLIP, ENTROPY = 0.99, 0.95, 0.2, 0.01
# (T, B, ...) each, but `state`, which is that before the first step.
Rollout = namedtuple("Rollout", "x starts action log_prob reward value advantage state")


class RecallCue:
    """`batch` environments in one; what is observed is (cue or 0, whether it is asked for)."""

    def __init__(self, batch: int, longest: int, device: str) -> None:
        self.longest, (self.cue, self.left) = longest, torch.zeros(2, batch, device=device)
        self.begin(self.left == 0)

    def begin(self, which: Tensor) -> None:
        self.start = which
        self.cue = torch.where(which, torch.randint_like(self.cue, 2) * 2 - 1, self.cue)
        steps = torch.randint_like(self.left, self.longest // 2, self.longest)
        self.left = torch.where(which, steps, self.left - 1)

    def observe(self) -> Tensor:
        return torch.stack([self.cue * self.start, (self.left == 0).float()], dim=1)

    def step(self, action: Tensor) -> Tensor:
        reward = (self.left == 0) * self.cue * (action * 2 - 1)
        self.begin(self.left == 0)
        return reward


class Policy(torch.nn.Module):
    """LSTM, then logits of the actions and the value of the state."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = fastrnn.LSTM(2, hidden)
        self.heads = torch.nn.Linear(hidden, 3)

    def forward(self, x: Tensor, state: Any, starts: Tensor) -> tuple[Categorical, Tensor, Any]:
        output, state = self.lstm(x, state, reset=starts)
        logits, value = self.heads(output).split([2, 1], dim=2)
        return Categorical(logits=logits), value.squeeze(2), state


@torch.no_grad()
def play(policy: Policy, env: RecallCue, state: Any, steps: int) -> tuple[Rollout, Any]:
    taken, before = [], state
    for _ in range(steps):
        x, start = env.observe(), env.start
        actions, value, state = policy(x[None], state, start[None])
        action = actions.sample()
        log_prob, reward = actions.log_prob(action)[0], env.step(action[0])
        taken.append((x, start, action[0], log_prob, reward, value[0]))
    x, starts, action, log_prob, reward, value = map(torch.stack, zip(*taken, strict=True))
    _, following, _ = policy(env.observe()[None], state, env.start[None])
    goes_on = ~torch.cat([starts[1:], env.start[None]])
    delta = reward + GAMMA * torch.cat([value[1:], following]) * goes_on - value
    advantage, last = torch.empty_like(value), 0.0
    for t in reversed(range(steps)):
        last = advantage[t] = delta[t] + GAMMA * LAMBDA * goes_on[t] * last
    return Rollout(x, starts, action, log_prob, reward, value, advantage, before), state


def ppo_loss(policy: Policy, old: Rollout) -> Tensor:
    actions, value, _ = policy(old.x, old.state, old.starts)
    ratio = (actions.log_prob(old.action) - old.log_prob).exp()
    normal = (old.advantage - old.advantage.mean()) / (old.advantage.std() + 1e-8)
    gain = torch.min(ratio * normal, ratio.clamp(1 - CLIP, 1 + CLIP) * normal)
    error = old.value + old.advantage - value
    return (0.5 * error**2 - gain - ENTROPY * actions.entropy()).mean()


def compare(lstm: fastrnn.LSTM, old: Rollout, device: str) -> list[float]:
    """Check that the loop over steps gives the same numbers; return its time, and that of ours."""
    stock = lstm.to_torch()  # with the same parameters
    state_0 = tuple(part.clone().requires_grad_() for part in old.state)
    towards = torch.randn(*old.starts.shape, lstm.hidden_size, device=device)

    def loop(state: Any = state_0) -> Tensor:
        outputs = []
        for x, keep in zip(old.x, 1.0 - old.starts.float()[:, None, :, None], strict=True):
            output, state = stock(x[None], (keep * state[0], keep * state[1]))
            outputs.append(output)
        return torch.cat(outputs)

    def both(output: Tensor) -> tuple[Tensor, ...]:
        return output, *torch.autograd.grad(output, (*lstm.parameters(), *state_0), towards)

    ways = lambda: both(loop()), lambda: both(lstm(old.x, state_0, reset=old.starts)[0])
    for a, b in zip(*(way() for way in ways), strict=True):  # gradients are sums over all steps
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())
    return seconds_each(device, 5, *ways)


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--envs", type=int, default=64, help="environments side by side")
    options.add_argument("--steps", type=int, default=128, help="steps of a rollout")
    options.add_argument("--longest", type=int, default=16, help="steps until the cue is asked for")
    options.add_argument("--updates", type=int, default=40)
    options.add_argument("--hidden", type=int, default=64)
    args = options.parse_args(argv)
    torch.manual_seed(args.seed)
    policy = Policy(args.hidden).to(args.device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    env = RecallCue(args.envs, args.longest, args.device)
    state: Any = tuple(torch.zeros(2, 1, args.envs, args.hidden, device=args.device))
    returns = []
    for _ in trange(args.updates):
        rollout, state = play(policy, env, state, args.steps)
        for _ in range(4):
            optimizer.zero_grad()
            ppo_loss(policy, rollout).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
        returns.append(rollout.reward[rollout.reward != 0].mean().item())
    print(f"mean return of the first rollout {returns[0]:.2f}, of the last {returns[-1]:.2f}")
    loop, call = compare(policy.lstm, rollout, args.device)
    print(f"the same numbers by a loop in {loop * 1e3:.1f} ms, by one call in {call * 1e3:.1f} ms")
    save(args.out, "ppo_resets", {"returns": returns, "loop": loop, "call": call})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
