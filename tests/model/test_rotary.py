"""Inverse frequencies against `transformers` (bit for bit) and against golden values in double precision."""

import pytest
import torch

from megatron.model.rotary import RotaryTable, inverse_frequencies
from megatron.neox_arguments.keys.model import RopeScaling

pytestmark = pytest.mark.unit

LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(("dim", "factor"), [(128, 8.0), (64, 32.0), (64, 8.0), (96, 4.0)])
def test_bit_equal_to_transformers(dim: int, factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**LLAMA_31, "factor": factor}
    config = LlamaConfig(
        hidden_size=dim * 2,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": 500000.0},
    )
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention_factor == 1.0
    assert torch.equal(inverse_frequencies(dim, 500000, RopeScaling(**scaling)), theirs)


def test_golden_values_of_llama_31() -> None:
    plain = inverse_frequencies(128, 500000, None).double()
    scaled = inverse_frequencies(128, 500000, RopeScaling(**LLAMA_31)).double()
    ratio = scaled / plain
    assert torch.equal(ratio[:29], torch.ones(29, dtype=torch.float64))
    assert torch.equal(ratio[35:], torch.full((29,), 0.125, dtype=torch.float64))
    blended = torch.tensor([0.828168, 0.643743, 0.493507, 0.371122, 0.271425, 0.190211], dtype=torch.float64)
    assert torch.allclose(ratio[29:35], blended, rtol=0, atol=1e-6)
    for pair, value in {28: 3.211445995e-03, 29: 2.166570764e-03, 32: 5.248461610e-04, 35: 9.556212354e-05}.items():
        assert float(scaled[pair]) == pytest.approx(value, rel=1e-6)
    assert float(scaled[63]) == pytest.approx(3.068925989e-07, rel=1e-6)


def test_golden_values_of_llama_32_1b() -> None:
    scaling = RopeScaling(**{**LLAMA_31, "factor": 32.0})
    ratio = (inverse_frequencies(64, 500000, scaling) / inverse_frequencies(64, 500000, None)).double()
    assert torch.equal(ratio[:15], torch.ones(15, dtype=torch.float64))
    assert torch.equal(ratio[18:], torch.full((14,), 1 / 32, dtype=torch.float64))
    expected = torch.tensor([0.605573, 0.303743, 0.103448], dtype=torch.float64)
    assert torch.allclose(ratio[15:18], expected, rtol=0, atol=1e-6)


def test_table_stays_fp32_and_exact_at_the_last_position() -> None:
    table = RotaryTable(128, 500000, RopeScaling(**LLAMA_31), 131072)
    module = torch.nn.Module()
    module.table = table
    module.to(torch.bfloat16)
    cos, sin = table.on(torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    angles = 131071 * table.inv_freq.double()
    step = 2.0**-8  # half a bf16 ulp at 1
    assert float((cos[-1].double() - angles.cos()).abs().max()) < step
    assert float((sin[-1].double() - angles.sin()).abs().max()) < step
