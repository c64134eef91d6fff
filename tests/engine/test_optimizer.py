"""Parameter groups follow the rows of the layout table."""

from __future__ import annotations

import pytest

from megatron.engine.optimizer import mark_sharded, parameter_groups, rows_of_parameters
from tests.support.checkpoints import SHAPE, module_of, weights

pytestmark = pytest.mark.unit


def test_norms_do_not_decay_and_are_not_sharded() -> None:
    layers = [(int(name[6:8]), module_of(tensors)) for name, tensors in weights(SHAPE, tp=1).items()]
    rows = rows_of_parameters(layers, SHAPE)
    parameters = [parameter for parameter, _ in rows]
    decaying, plain = parameter_groups(parameters, {id(parameter): row for parameter, row in rows}, 0.1)
    assert (decaying["name"], decaying["weight_decay"]) == ("weight_decay_params", 0.1)
    assert (plain["name"], plain["weight_decay"]) == ("no_weight_decay_params", 0.0)
    norms = {id(p) for _, layer in layers for name, p in layer.named_parameters() if "norm" in name}
    assert {id(p) for p in plain["params"]} == norms
    assert len(decaying["params"]) + len(plain["params"]) == len(parameters) == 2 * 6 + 3
    mark_sharded(rows)
    assert {id(p) for p in parameters if not p.tensor_model_parallel} == norms  # type: ignore[attr-defined]
