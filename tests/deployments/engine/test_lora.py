"""Adapters stacked for torch's operators: columns stay where they are, and nothing of one adapter reaches another."""

import pytest
import torch

from deployments.engine.llama.lora import LoraStacks, LoraWeights

CPU = torch.device("cpu")
Q, V = (0, "q_proj"), (1, "v_proj")


def weights(r: int, *places: tuple[int, str], scaling: float = 2.0) -> LoraWeights:
    generator = torch.Generator().manual_seed(r)
    return LoraWeights(
        {place: (torch.randn(r, 6, generator=generator), torch.randn(r, 5, generator=generator)) for place in places},
        scaling,
    )


def applied(stacks: LoraStacks, slot: int, place: tuple[int, str], x: torch.Tensor) -> torch.Tensor:
    """The output that the forward adds for a token of this slot."""
    owned = stacks.stacked.owned_by(torch.full((len(x),), slot))
    return stacks.stacked.add(place, owned, x, torch.zeros(len(x), 5))


def expected(adapter: LoraWeights, place: tuple[int, str], x: torch.Tensor) -> torch.Tensor:
    a, b = adapter.pairs[place]
    return (x @ a.T) @ b * adapter.scaling


@pytest.fixture
def stacks() -> LoraStacks:
    return LoraStacks(CPU, torch.float32)


def test_each_slot_applies_its_own_adapter_whatever_the_ranks_and_targets(stacks: LoraStacks) -> None:
    adapters = {0: weights(4, Q, V), 1: weights(64, V), 2: weights(1, Q, scaling=0.5), 3: weights(8, Q, V)}
    for slot, adapter in adapters.items():
        stacks.put(slot, adapter)
    x = torch.randn(3, 6)
    for slot, adapter in adapters.items():
        for place in (Q, V):
            output = applied(stacks, slot, place, x)
            if place in adapter.pairs:
                assert torch.allclose(output, expected(adapter, place, x), atol=1e-5)
            else:
                assert not output.any()


def test_what_is_loaded_stays_at_its_address_while_there_is_room(stacks: LoraStacks) -> None:
    stacks.put(0, weights(4, Q))
    before = stacks.stacked
    a, b = (stack.clone() for stack in before.pairs[Q])
    stacks.put(1, weights(8, Q))
    stacks.put(1, None)
    assert stacks.stacked is before
    assert torch.equal(before.pairs[Q][0][:4], a[:4])
    assert torch.equal(before.pairs[Q][1][:4], b[:4])
    stacks.put(1, weights(8, V))  # a new target, then too many columns
    assert stacks.stacked is not before
    grown = stacks.stacked
    stacks.put(2, weights(64, Q))
    assert stacks.stacked is not grown
    x = torch.randn(2, 6)
    assert torch.allclose(applied(stacks, 0, Q, x), expected(weights(4, Q), Q, x), atol=1e-5)


def test_columns_of_an_evicted_adapter_hold_nothing_of_it_for_the_next(stacks: LoraStacks) -> None:
    stacks.put(0, weights(16, Q, V))
    stacks.put(0, weights(8, V))  # the slot's adapter changed, without a target that the old one had
    x = torch.randn(2, 6)
    assert not applied(stacks, 0, Q, x).any()
    assert torch.allclose(applied(stacks, 0, V, x), expected(weights(8, V), V, x), atol=1e-5)
    stacks.put(0, None)
    assert not applied(stacks, 0, V, x).any()
    assert len(stacks.stacked.owner) == 16


def test_a_thousand_loads_take_no_more_columns_than_the_slots_need(stacks: LoraStacks) -> None:
    for i in range(1000):
        stacks.put(i % 4, weights((4, 8, 16, 3)[i % 3], Q))
    assert len(stacks.stacked.owner) == 64


@pytest.mark.promise("D9")
@pytest.mark.parametrize(("a", "b", "scaling"), [(float("nan"), 1, 1), (3.4e38, 1, 1), (1, 2e38, 2)])
def test_numbers_that_are_not_finite_in_the_compute_dtype_are_refused(a: float, b: float, scaling: float) -> None:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{prefix}.lora_A.weight": torch.full((2, 6), a), f"{prefix}.lora_B.weight": torch.full((5, 2), b)}
    with pytest.raises(ValueError, match=r"q_proj.lora_[AB].weight has numbers that are not finite in bfloat16"):
        LoraWeights.from_peft(tensors, scaling, torch.bfloat16, CPU)
