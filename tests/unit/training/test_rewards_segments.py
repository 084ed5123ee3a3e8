"""Preferences between trajectory segments in a toy world (Christiano et al. 2017).

A walker on a ring of places is judged by a hidden reward of each step. Only which of two segments is
better is told; a reward model of single steps is fitted to that, and a policy is read off it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline_lib.losses.reward.pairs import segment_preference

PLACES, ACTIONS, STEPS, PAIRS = 6, 3, 8, 4000
MOVES = (-1, 0, 1)


def hidden_reward() -> Tensor:
    """Reward of each action at each place; place 4 is where one wants to be, and standing still is cheap."""
    reward_SA = torch.zeros(PLACES, ACTIONS, dtype=torch.float64)
    for place in range(PLACES):
        for action, move in enumerate(MOVES):
            reward_SA[place, action] = 1.5 * ((place + move) % PLACES == 4) - 0.3 * abs(move)
    return reward_SA


def segments(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random walks: places and actions of each step, `(count, STEPS)`."""
    place = torch.randint(PLACES, (count,), generator=generator)
    action_PS = torch.randint(ACTIONS, (count, STEPS), generator=generator)
    places = []
    for step in range(STEPS):
        places.append(place)
        place = (place + action_PS[:, step] - 1) % PLACES
    return torch.stack(places, -1), action_PS


def fitted(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], first_share_P: Tensor) -> Tensor:
    """Fit a reward of each place and action to the preferences."""
    reward_SA = torch.zeros(PLACES, ACTIONS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([reward_SA], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = segment_preference(reward_SA[first], reward_SA[second], first_share_P).mean()
        # Preferences do not tell where the zero is, and on a ring little more: the smallest rewards are taken.
        (loss + 1e-4 * reward_SA.square().sum()).backward()
        return loss

    optimizer.step(closure)
    return reward_SA.detach()


def greedy(reward_SA: Tensor, *, gamma: float = 0.9) -> list[int]:
    """The best action at each place, by value iteration."""
    value_S = torch.zeros(PLACES, dtype=torch.float64)
    next_SA = torch.tensor([[(place + move) % PLACES for move in MOVES] for place in range(PLACES)])
    for _ in range(300):
        value_SA = reward_SA + gamma * value_S[next_SA]
        value_S = value_SA.amax(-1)
    return value_SA.argmax(-1).tolist()


def test_preferences_between_segments_teach_the_hidden_reward() -> None:
    generator = torch.Generator().manual_seed(0)
    truth_SA = hidden_reward()
    first, second = segments(PAIRS, generator), segments(PAIRS, generator)
    lead_P = truth_SA[first].sum(-1) - truth_SA[second].sum(-1)
    # The judge errs as Bradley-Terry says, and cannot tell some pairs apart.
    is_first_P = torch.rand(PAIRS, generator=generator, dtype=torch.float64) < torch.sigmoid(lead_P)
    first_share_P = torch.where(lead_P.abs() < 0.2, 0.5, is_first_P.double())
    learned_SA = fitted(first, second, first_share_P)

    fresh = segments(2000, generator), segments(2000, generator)
    true_lead_P = truth_SA[fresh[0]].sum(-1) - truth_SA[fresh[1]].sum(-1)
    learned_lead_P = learned_SA[fresh[0]].sum(-1) - learned_SA[fresh[1]].sum(-1)
    assert float(torch.corrcoef(torch.stack([true_lead_P, learned_lead_P]))[0, 1]) > 0.99
    # At place 1 both ways round are equally long.
    assert [greedy(learned_SA)[place] for place in (0, 2, 3, 4, 5)] == [
        greedy(truth_SA)[place] for place in (0, 2, 3, 4, 5)
    ]


def test_the_optimum_walks_to_the_place_and_stays() -> None:
    # Worked by hand: from 4 and its neighbours 3 and 5 the way is clear, 2 and 0 are two steps away, 1 is three.
    stay, left, right = 1, 0, 2
    assert greedy(hidden_reward())[2:] == [right, right, stay, left]
    assert greedy(hidden_reward())[0] == left


def test_each_pair_is_judged_by_its_own_sums() -> None:
    generator = torch.Generator().manual_seed(1)
    first_PS, second_PS = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    share_P = torch.tensor([1.0, 0.0, 0.5, 0.25, 1.0], dtype=torch.float64)
    together_P = segment_preference(first_PS, second_PS, share_P)
    for pair in range(5):
        one = slice(pair, pair + 1)
        torch.testing.assert_close(segment_preference(first_PS[one], second_PS[one], share_P[one]), together_P[one])
    # How a segment's sum is spread over its steps does not matter.
    torch.testing.assert_close(segment_preference(first_PS.flip(-1), second_PS, share_P), together_P)
    # Turned round, the preference turns round.
    torch.testing.assert_close(segment_preference(second_PS, first_PS, 1 - share_P), together_P)
