"""What a step computes of the context alone, it would compute again at every step: no product of it may, in any backbone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from mc_export.backbones.sana import Sana
from mc_export.model.injection import CanvasBackbone
from mc_export.rewrites.kernels import use_kernels
from tests.factories import CONTEXT_DIM, tiny_sana
from tests.tiny_steps import KINDS, sizes_for, tiny_step

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "matmul", "einsum", "attention")
FROM_CONTEXT = {"context", "context_mask"}


class Origins(TorchDispatchMode):
    """Notes of every tensor which inputs it comes from, and the products of which all operands come from the context."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()
        self.attended = 0
        self._origins = WeakTensorKeyDictionary()
        for name, tensor in inputs.items():
            self._origins[tensor] = {name}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_iter((args, kwargs or {})) if isinstance(each, Tensor)]
        origins = set().union(*(self._origins.get(tensor, set()) for tensor in tensors))
        name = func.__name__.partition(".")[0]
        if any(name == product or (product == "attention" and product in name) for product in PRODUCTS):
            if "context" in origins and origins <= FROM_CONTEXT:
                self.products[name] += 1
            self.attended += "context" in origins
        results = func(*args, **(kwargs or {}))
        for result in tree_iter(results):
            if isinstance(result, Tensor):
                self._origins[result] = origins | self._origins.get(result, set())
        return results


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize("name", KINDS)
def test_keys_and_values_are_computed_before_the_loop(name: str, kernels: bool) -> None:
    program = tiny_step(name)
    if kernels:
        use_kernels(program)
    inputs = program.example(sizes_for(program, False), seed=2)
    with Origins(inputs) as origins:
        program.run(inputs)
    assert origins.attended > 0, "the context must reach a product"
    assert origins.products == Counter()


def test_a_published_model_computes_them_at_every_step() -> None:
    model = tiny_sana(seed=4)
    inputs = {
        "sample": torch.randn(1, 4, 4, 6), "timestep": torch.tensor([500.0]), "context": torch.randn(1, 5, CONTEXT_DIM),
        "context_mask": torch.ones(1, 5, dtype=torch.int64),
    }  # fmt: skip
    with torch.inference_mode(), Origins(inputs) as origins:
        CanvasBackbone(Sana(), model, None)(**inputs)
    # Two layers of the caption's projection, keys and values of two blocks.
    assert sum(origins.products.values()) == 2 + 2 * 2
